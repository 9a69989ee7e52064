"""What computes gradients and moves the weights: one engine for each way to share the work.

`plain` is one process, or several with whole weights (DDP), and what the others differ from;
`sharded` is torch's fully_shard; `deepspeed` is DeepSpeed's ZeRO, and `deepspeed_config` what is
asked of it.
"""
