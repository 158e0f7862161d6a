"""proper_ds: one model for each user, after PROPER: population, group and user LoRAs on DeepSpeed and Ray."""

__version__ = "0.1.0"
