"""What train.py is built of, and what reads its runs: settings, stage 1, checkpoints, precision, processes."""
