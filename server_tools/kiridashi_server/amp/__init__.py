"""Score learning: one number per unit, learnt once per past task on the frozen backbone."""
