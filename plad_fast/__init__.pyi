from .errors import UsageError as UsageError
from .losses.registry import register_loss as register_loss
from .ops.logprobs import SequenceLogProbs as SequenceLogProbs
from .ops.logprobs import linear_sequence_logprobs as linear_sequence_logprobs
from .ops.logprobs import sequence_logprobs as sequence_logprobs
from .ops.preference_losses import FusedLoss as FusedLoss
from .ops.preference_losses import fused_linear_preference_loss as fused_linear_preference_loss
from .ops.preference_losses import preference_loss as preference_loss
from .training.config import PLaDConfig as PLaDConfig
from .training.trainer import PLaDTrainer as PLaDTrainer

__version__: str
