from .config import PLaDConfig as PLaDConfig
from .reference_logps import add_reference_logps as add_reference_logps
from .train import train_model as train_model
from .trainer import PLaDTrainer as PLaDTrainer
from .validation import Validation as Validation
