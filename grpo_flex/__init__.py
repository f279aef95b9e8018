"""GRPO-Flex: reinforcement learning for image and video generators, judged by a vision-language model."""
