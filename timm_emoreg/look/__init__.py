"""Pictures of what a model answers. The command is ``python -m timm_emoreg.look``."""
