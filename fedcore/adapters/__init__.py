"""LoRA adapters: which factors belong together, what can be combined and how, and the combining of folders."""
