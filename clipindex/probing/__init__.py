"""Linear probes: trained on embeddings and labels, kept, measured, and compared over training rows and over encoders.

DIR/probe/probe.safetensors  weights [C, D] and intercept [C], float32
DIR/probe/probe.json         classes, protocol, C, model, features, and what was measured
DIR/probe/few_shot.json      accuracies over shots; few_shot.png beside it
compare/compare.json        several encoders on the same rows; compare.png beside it
"""

from clipindex.probing.compare import compare_encoders
from clipindex.probing.comparison import Comparison
from clipindex.probing.evaluation import Evaluation, evaluate_probe, write_predictions
from clipindex.probing.few_shot import FewShotCurve, FewShotPoint, few_shot_curve
from clipindex.probing.probe import Probe, read_probe, write_probe
from clipindex.probing.protocols import PROTOCOLS, README_C
from clipindex.probing.ranking import MultiLabelEvaluation
from clipindex.probing.train import TrainSummary, train_probe

__all__ = [
    "PROTOCOLS",
    "README_C",
    "Comparison",
    "Evaluation",
    "FewShotCurve",
    "FewShotPoint",
    "MultiLabelEvaluation",
    "Probe",
    "TrainSummary",
    "compare_encoders",
    "evaluate_probe",
    "few_shot_curve",
    "write_predictions",
    "read_probe",
    "train_probe",
    "write_probe",
]
