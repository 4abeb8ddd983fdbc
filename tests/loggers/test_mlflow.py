"""MLflow, in a folder, as both Lightning and Hugging Face write to it."""

import json
from pathlib import Path

import pytest

from bnguard.lightning import BatchNormMonitor
from tests.loggers.runs import fit, train_with_hugging_face

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")


@pytest.fixture
def client(tmp_path, monkeypatch):
    uri = f"file:{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient(uri)
    mlflow.set_tracking_uri(None)


def check(client, run_id, report, folder):
    metrics = client.get_run(run_id).data.metrics
    assert sum(name.startswith("zz_bnguard/") for name in metrics) == 5
    assert metrics["zz_bnguard/findings"] == len(report.findings)

    def text(name):
        return Path(client.download_artifacts(run_id, name, str(folder))).read_text("utf-8")

    assert "BN303 unconverged-statistics at layers.1" in text("bnguard-findings.txt")
    assert text("bnguard-report.txt") == f"{report}\n"
    assert json.loads(text("bnguard-report.json")) == report.to_dict()


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning(package, client, tmp_path):
    lightning = pytest.importorskip(package)
    logger = lightning.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    callback = BatchNormMonitor(strict=True)
    fit(lightning, logger, callback)
    check(client, logger.run_id, callback.report, tmp_path)
    history = client.get_metric_history(logger.run_id, "zz_bnguard/values_per_channel")
    assert [metric.step for metric in history] == [1, 3, 5, 5, 7, 9, 11, 11, 12]


def test_hugging_face(client, tmp_path):
    transformers = pytest.importorskip("transformers")
    from bnguard.transformers import BatchNormCallback

    callback = BatchNormCallback()
    train_with_hugging_face(transformers, tmp_path, callback, report_to=["mlflow"])
    (run,) = client.search_runs(["0"])
    check(client, run.info.run_id, callback.report, tmp_path)
