from fewbits.reproductions.vectors.additive_bits import opponents, run


def test_quick_run_computes_its_verdict():
    result = run("quick")
    ahead = [
        own - other
        for own, other in zip(result.figures.values(), result.baselines.values(), strict=True)
    ]
    assert result.holds == (min(ahead) >= 0)
    assert all(0 < value <= 1 for value in (*result.figures.values(), *result.baselines.values()))
    # Equal size: nobody takes more bytes than we do.
    assert all(row["bytes"] <= 8 for row in result.details)


def test_opponents_fill_the_bytes_they_are_given():
    assert "opq:bytes=48,dims=192,rounds=50" in opponents(48, 384)
    assert "rabitq:bits=1" in opponents(56, 384)
    assert "pca-rag:dims=320+rabitq:bits=1" in opponents(48, 384)
