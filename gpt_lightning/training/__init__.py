"""Training: the LightningModule, its optimizer, checkpoints, callbacks and reports."""
