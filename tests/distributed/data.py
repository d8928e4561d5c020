"""What every test of a layout trains on, and how."""

VOCABULARY = 64
SEQUENCE = 16

#: Sequences of a step, over all ranks and microbatches of one sequence each.
BATCH = 4

OPTIMIZER = {
    "optimizer": "adam",
    "lr": 3e-3,
    "min_lr": 3e-3,
    "weight_decay": 0.1,
    # Gradients that are nothing but rounding must not move a parameter by a whole step.
    "adam_eps": 1e-5,
    "clip_grad": 0.5,
}
