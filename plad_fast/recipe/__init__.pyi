from .distillation import distill as distill
from .evaluate import evaluate_on_pairs as evaluate_on_pairs
from .search import TuneConfig as TuneConfig
from .settings import DistillConfig as DistillConfig
from .settings_file import load_settings as load_settings
from .stages import pair_models as pair_models
from .stages import train_on_pairs as train_on_pairs
from .tune import tune as tune
