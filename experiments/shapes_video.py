"""The main job for video: a tiny Wan learns to obey its prompts from the verdicts of a tiny judge of clips that vLLM serves, on two cores.

The path is that of `shapes_image.py`, whose settings of judging and learning these are: the judge, which sees eight frames of
each clip, is what is optimised, and the oracle's score on held-out prompts is the truth that nobody optimises.
`shapes_video_oracle.py` asks the oracle itself.
"""

from dataclasses import replace

from experiments import shapes_image, shapes_video_oracle
from grpo_flex.config import RunConfig
from reward_server.families.flex import Flex
from reward_server.serve import VllmJudge


def config() -> RunConfig:
    base, image = shapes_video_oracle.config(), shapes_image.config()
    assert image.judge is not None and isinstance(image.judge.server, VllmJudge)
    return replace(
        base,
        name="shapes_video",
        steps=image.steps,
        sampling=replace(base.sampling, group_size=image.sampling.group_size),
        judge=replace(
            image.judge,
            family=Flex(medium="video", prompt_file="testbed/tiny_video_judge/prompt.txt", structured=False),
            server=replace(image.judge.server, model="testbed/tiny_video_judge"),
            max_tokens=128,
        ),
        reward=image.reward,
        objective=image.objective,
        optimizer=image.optimizer,
    )
