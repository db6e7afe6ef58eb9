from gpt2.experiments import together


def test_time_saved():
    text = together.saved_time(190, 290, shared=False, noun="job")
    assert text == (
        "In parallel 3m 10s, one after another about 4m 50s at these speeds: 1m 40s saved (34 %)"
    )
    assert "nothing saved" in together.saved_time(20, 19, shared=False, noun="job")
    assert "less was saved, or nothing" in together.saved_time(190, 290, shared=True, noun="job")
