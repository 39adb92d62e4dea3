"""Every experiment of Dissecting Fine-Tuning Unlearning (2410.06606) on one set of models."""
