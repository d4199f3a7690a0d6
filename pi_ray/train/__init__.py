"""Training: LoRA through all phases in one process group.

Prepared datasets of phases enter; adapters, a training log and checkpoints leave. launch.py starts workers on Ray
Train, trainer.py is the loop of each. Imports go down to run/, models and cluster/, never up to evaluate/.
"""
