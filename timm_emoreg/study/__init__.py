"""Does affective pre-training help? The command is ``python -m timm_emoreg.study``."""
