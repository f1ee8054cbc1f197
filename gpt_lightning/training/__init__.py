"""Learning: the LightningModule, its optimizer, its checkpoints, and what watches a run."""
