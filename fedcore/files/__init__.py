"""Files of models and data, and what is computed of them without a run."""
