import pytest

from gemlet.errors import GemletError
from gemlet.hub import _explained


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ConnectionResetError(104, "Connection reset\nby peer"),
            "(ConnectionResetError: [Errno 104] Connection reset by",
        ),
        (ValueError("x" * 900), "run the same command again to go on, or give a file or folder instead"),
    ],
)
def test_whatever_goes_wrong_is_one_sentence(error, words):
    with pytest.raises(GemletError) as caught, _explained("owner/name", "dataset", "a.txt"):
        raise error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_error_that_is_a_sentence_already_stays_as_it_is():
    with pytest.raises(GemletError, match=r"^mine$"), _explained("owner/name", "dataset"):
        raise GemletError("mine")
