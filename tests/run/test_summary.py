from mmformer.run.summary import final_table


def test_a_metric_has_one_row_with_its_subsets_beside_it(tmp_path, capsys):
    metrics = {"val/loss": 0.5, "val/acc": 0.9, "val/acc_t": 0.4, "test/loss": 0.6, "test/acc": 0.8}
    metrics |= {"test/acc_t": 0.3, "test/acc_ti": 0.8, "test/t2i_r@1": 0.25}
    (tmp_path / "metrics.json").touch()
    final_table(metrics, ["text", "image"], tmp_path, {"predict": "mmformer predict RUN"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["metric", "val", "test", "t", "ti"]
    assert lines[1:4] == [
        ["loss", "0.5000", "0.6000"],
        ["acc", "0.9000", "0.8000", "0.3000", "0.8000"],
        ["t2i_r@1", "0.2500"],
    ]
    assert lines[4] == ["metrics", str(tmp_path / "metrics.json")]
    assert lines[5] == ["predict", "mmformer", "predict", "RUN"]
