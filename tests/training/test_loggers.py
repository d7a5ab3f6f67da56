"""Trackers that survive a kill, and never ask."""

from mmformer.training import loggers


def test_a_table_of_metrics_takes_new_columns_and_goes_back(tmp_path):
    path = tmp_path / "metrics.csv"
    table = loggers.MetricsCSV(str(path))
    table.log_metrics({"loss": 0.5}, 1)
    table.log_metrics({"loss": 0.25}, 2)
    table.log_metrics({"val/acc": 1.0}, 2)
    assert path.read_text() == "step,loss,val/acc\n1,0.5,\n2,0.25,\n2,,1.0\n"
    again = loggers.MetricsCSV(str(path))
    again.rewind(2)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"
    again.log_metrics({"loss": 0.125}, 3)
    assert again.rows == 3


def test_wandb_goes_offline_with_one_warning_and_never_asks(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "no API key" in str(loggers.offline_reason())
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in str(loggers.offline_reason(timeout=0.5))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY")
    assert "cannot be reached" in str(loggers.offline_reason(timeout=0.5))
