import numpy as np
import torch
from known_answers import hfill, load, u01


def test_fill_of_the_vectors_is_the_one_that_they_were_made_with():
    expected = load("selfcheck.json")
    for stream in (0, 5):
        assert u01(8, stream).tolist() == expected[f"u01_stream{stream}_n8"]
    fill = torch.tensor(expected["hfill_((2,3),7,amp 1.5,base .5)"])
    assert torch.equal(hfill((2, 3), 7, 1.5, 0.5), fill)
    assert np.all((u01(1000, 3) >= 0) & (u01(1000, 3) < 1))
