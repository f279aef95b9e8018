"""One file per judge family: how to ask (request, reply schema) and how to read the reply (a total parser).

Nothing here imports torch, vLLM or the trainer, so a configuration that names a family loads at once.
"""
