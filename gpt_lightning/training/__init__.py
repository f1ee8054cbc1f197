"""Training: the LightningModule, its optimizer, checkpoints, callbacks and reports."""

import logging
import warnings

# Lightning's advertisements and a warning about its own code, in every `Trainer(...)`
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "Tip:" not in record.getMessage()
)
warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
