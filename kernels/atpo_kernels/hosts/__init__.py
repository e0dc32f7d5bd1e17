"""Adapters of the fused losses to other trainers, as in `from atpo_kernels.hosts.trl import TurnGRPOTrainer`.

    trl              TRL: trainers with a ratio for each turn
    verl             verl: policy loss and advantage estimators, registered by the entry point `verl.plugins`
    skyrl            SkyRL: policy loss, registered by `register()`
    openrlhf         OpenRLHF: `TurnPolicyLoss` in the place of its `PolicyLoss`
    prime_rl, slime  the function that their configuration names by its path
    plain            any PyTorch model: an LM head that computes the loss in its forward
    credit           advantages of turns for all of them

A module needs PyTorch; its host is imported when it is used, so each can be imported without any host. What a host
offers that an adapter does not have is refused by name. `python -m atpo_kernels.hosts` says which hosts are installed,
which versions were tested, and whether their registrations are found.
"""
