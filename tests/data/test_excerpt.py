from gpt2.data import excerpt, tokenizer
from gpt2.data.excerpt import Piece
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.vocabulary import Characters

MARK = tokenizer.END_OF_TEXT


def test_an_excerpt_is_divided_where_documents_begin():
    one, two = tokenizer.encode("one"), tokenizer.encode("two <|endoftext|>")
    assert excerpt.divided([*one, MARK, *two, MARK], GPT2_TOKENIZER) == (
        Piece(False, "one"),
        Piece(True, "two <|endoftext|>"),
        Piece(True, ""),
    )
    assert excerpt.divided([MARK, *one], GPT2_TOKENIZER) == (Piece(True, "one"),)
    assert excerpt.divided([], GPT2_TOKENIZER) == ()


def test_a_character_that_is_cut_is_replaced():
    (piece,) = excerpt.divided(tokenizer.encode("日本")[:1], GPT2_TOKENIZER)
    assert piece.text == "\ufffd"


def test_an_own_vocabulary_has_no_end_of_text():
    own = ("a", "é", "\n")
    assert excerpt.divided([1, 0, 2], Characters(own)) == (Piece(False, "éa\n"),)
    large = tuple(chr(ord("a") + number) for number in range(MARK + 1))
    assert excerpt.divided([0, MARK], Characters(large)) == (Piece(False, f"a{large[MARK]}"),)
