"""What a run leaves behind for people: `predictions.parquet`, `run.json` and `report.html`."""

from mmformer.report.predictions import Answers as Answers
from mmformer.report.predictions import Predictions as Predictions
from mmformer.report.predictions import read_predictions as read_predictions
from mmformer.report.predictions import write_predictions as write_predictions
from mmformer.report.report import write_report as write_report
from mmformer.report.run import Run as Run
from mmformer.report.run import describe_run as describe_run
from mmformer.report.run import find_runs as find_runs
from mmformer.report.run import read_run as read_run
