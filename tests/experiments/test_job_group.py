from gpt2.experiments import job_group


def test_time_saved():
    text = job_group.saved_time(190, 290)
    assert text.startswith(
        "In parallel 3m 10s, one after another about 4m 50s at these speeds: 1m 40s saved (34 %)\n"
    )
    rounded = job_group.saved_time(46.4, 72.6)
    assert "46s" in rounded and "1m 13s" in rounded and "27s saved" in rounded, "as 73 - 46"
    assert "0s saved (0 %)" in job_group.saved_time(20, 19)
