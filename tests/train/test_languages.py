# ruff: noqa: RUF001
"""`prepare`, `finetune classify` and `finetune tokens` on Chinese, Russian and French, and scripts
whose vowels are marks: built-in texts, and messages of this system where it has their catalogs."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
import transformers

import bertfast
from bertfast.train import ClassifyConfig, finetune
from bertfast.train.tasks import tokens
from bertfast.train.tasks.classify_inference import predict

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import languages

TEXTS = {  # of two kinds, a placeholder in each
    "zh_CN": (
        ["无法打开文件 %s", "无法读取文件%s，请重试", "文件%s不存在", "正在写入文件 %s。"],
        ["正在连接服务器%s", "服务器 %s 没有响应", "与服务器%s的连接已断开", "找不到服务器 %s！"],
    ),
    "ru": (
        ["Не удалось открыть файл %s", "Файл «%s» не найден", "Чтение файла %s", "Ёмкий файл: %s"],
        ["Поиск сервера %s", "Сервер %s не отвечает", "Свой сервер «%s»", "Сервер %s занят"],
    ),
    "fr": (
        ["Impossible d’ouvrir le fichier %s", "Le fichier « %s » a été créé", "Fichier %s protégé"],
        ["Le serveur « %s » n’a pas répondu", "Connexion au serveur %s", "Serveur %s arrêté à 3 h"],
    ),
}
SIGNS = {
    "hi": ["फ़ाइल नहीं खुली: हिन्दी में संदेश", "बड़ा संदेश पढ़ें और लिखें", "ढाँचा ठीक से सहेजा गया"],
    "bn": ["ফাইলটি খোলা যায়নি", "বাংলা ভাষায় বড় বার্তা পড়া হয়েছে", "আষাঢ় মাসে সংরক্ষণ করা হয়"],
    "ta": ["கோப்பைத் திறக்க முடியவில்லை", "தமிழ் மொழியில் செய்தி", "கொடுக்கப்பட்ட பெயர்"],
    "th": ["ไม่สามารถเปิดแฟ้มได้", "ข้อความภาษาไทยที่นี่", "กำลังบันทึกข้อมูลอยู่"],
}  # fmt: skip


def checkpoint(folder: Path, texts, lowercase=True) -> str:
    made = languages.tokenizer_of(texts, folder / "prepared", lowercase)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "initializer_range": 0.1, "vocab_size": len(tokenizer)}
    sizes |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, attention_probs_dropout_prob=0.0)
    bertfast.BertModel(config).save_pretrained(folder / "model")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def settings(folder, model, rows) -> dict:
    path = str(languages.write(folder / "rows.jsonl", rows))
    common = {"train": path, "valid": path, "out": str(folder / "out"), "epochs": 20}
    return common | {"model": model, "lr": 1e-2, "max_length": 48, "batch_size": 4, "device": "cpu"}


@pytest.mark.parametrize("language", TEXTS)
def test_classes_of_texts(tmp_path, language):
    rows = [
        {"text": text, "label": label}
        for label, texts in zip(("文件", "сервер é"), TEXTS[language], strict=True)
        for text in texts
    ]
    model = checkpoint(tmp_path, [row["text"] for row in rows] * 2)
    found = finetune(ClassifyConfig(**settings(tmp_path, model, rows)))
    assert found["valid"]["macro_f1"] == 1.0
    told = predict(str(tmp_path / "out"), [row["text"] for row in rows])
    assert [row["label"] for row in told] == [row["label"] for row in rows]
    saved = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert set(saved["label2id"]) == {"文件", "сервер é"}


@pytest.mark.seconds
@pytest.mark.parametrize("language", TEXTS)
def test_placeholders_are_cut_out_of_the_raw_text(tmp_path, language):
    """In code points, whatever stands before: here a character beyond 16 bits and accents apart."""
    texts = [text for texts in TEXTS[language] for text in texts]
    texts += ["\U00020bb7 " + unicodedata.normalize("NFD", text) for text in texts]
    rows = [{"text": text, "spans": languages.spans(text)} for text in texts]
    assert all(len(row["spans"]) == 1 for row in rows)
    model = checkpoint(tmp_path, texts * 2)
    found = finetune(tokens.TokensConfig(**settings(tmp_path, model, rows)))
    assert found["valid"]["micro_f1"] == 1.0
    path = languages.write(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    told = list(tokens.predict_table(str(tmp_path / "out"), str(path)))
    for text, row in zip(texts, told, strict=True):
        (entity,) = row["entities"]
        assert text[entity["start"] : entity["end"]] == entity["text"] == "%s"
        assert entity["label"] == "PLACEHOLDER" and entity["start"] == text.index("%s")


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("language", [*SIGNS, "ru", "fr"])
def test_marks_come_back(tmp_path, language, lowercase):
    if language in SIGNS:  # letters with a dot as one character, which NFC takes apart
        composed = {"\u09af\u09bc": "\u09df", "\u09a1\u09bc": "\u09dc", "\u09a2\u09bc": "\u09dd"}
        composed |= {"\u092b\u093c": "\u095e", "\u0921\u093c": "\u095c", "\u0922\u093c": "\u095d"}
        texts = [unicodedata.normalize("NFC", text) for text in SIGNS[language]]
        for parts, letter in composed.items():
            texts = [text.replace(parts, letter) for text in texts]
        dotted = any(letter in text for letter in composed.values() for text in texts)
        assert dotted == (language in ("hi", "bn"))
    else:
        texts = [*TEXTS[language][0], *TEXTS[language][1], "Ёлка, йод: déjà vu, naïveté"]
    trip = languages.round_trip(languages.tokenizer_of(texts * 3, tmp_path / "t", lowercase), texts)
    assert trip["unknown"] == 0 and trip["marks"] > 3
    keeps = language in SIGNS or not lowercase  # BERT's lower-casing takes accents
    assert (trip["kept"] == len(texts)) == keeps


def test_letters_tell_marks_apart():
    assert languages.letters("Été, ёж!") == unicodedata.normalize("NFD", "étéёж")
    assert languages.letters("हैं") != languages.letters("है") != languages.letters("ह")


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "使用--help查看%s，或-x。",
            [("--help", "OPTION"), ("%s", "PLACEHOLDER"), ("-x", "OPTION")],
        ),
        ("clé-valeur est-ce que 100% des %d", [("%d", "PLACEHOLDER")]),
        ("%1$s и %(имя)s 50%%", [("%1$s", "PLACEHOLDER"), ("%(имя)s", "PLACEHOLDER")]),
        ("{0}: %pB", [("{0}", "PLACEHOLDER"), ("%pB", "PLACEHOLDER")]),
        ("что-то из-за %.*f", [("%.*f", "PLACEHOLDER")]),
        ("не более %ldкБ", None),  # no word's end: the tag can't be told from the letters
        ("不能超过%ld个", [("%ld", "PLACEHOLDER")]),
    ],
)
def test_tags_by_rules(text, found):
    spans = languages.spans(text)
    assert (spans and [(text[s["start"] : s["end"]], s["label"]) for s in spans]) == found


@pytest.mark.seconds
@pytest.mark.parametrize("language", ["zh_CN", "ru", "fr", "hi", "bn", "ta", "th"])
def test_messages_of_this_system(tmp_path, language):
    """No text twice or in two parts; marks of held-out ones come back, hardly any is unknown."""
    rows, _ = languages.messages(languages.LOCALES, language)
    if len(rows) < 1000:
        pytest.skip(f"{languages.LOCALES} has {len(rows)} messages of {language}")
    same = [unicodedata.normalize("NFC", " ".join(row["text"].split())).casefold() for row in rows]
    assert len(set(same)) == len(same)
    assert all(row["text"] != row["source"] for row in rows)
    parts = languages.split(rows)
    assert sum(map(len, parts.values())) == len(rows)
    sources = [{row["source"] for row in part} for part in parts.values()]
    assert not any(a & b for i, a in enumerate(sources) for b in sources[:i])
    texts = [[row["text"] for row in parts[p]][:n] for p, n in (("train", 4000), ("test", 500))]
    tokenizer = languages.tokenizer_of(texts[0], tmp_path / "t", lowercase=language in SIGNS)
    trip = languages.round_trip(tokenizer, texts[1])
    assert trip["unknown"] < languages.UNKNOWN and trip["kept"] == trip["without_unknown"]


def test_catalog_with_plurals(tmp_path):
    """Every form of a plural, untranslated and repeated ones left out, contexts taken off."""
    for name, entries in {
        "a": {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n>1;\n",
              "one file\0%d files": "ein Heft\0%d Hefte", "menu\x04Open it": "Öffnen bitte",
              "same": "same", "No": "Ja", "shared": "überall gleich", "next": "Öffnen  BITTE"},
        "b": {"": "Content-Type: text/plain; charset=UTF-8\n", "other": "Überall gleich"},
    }.items():  # fmt: skip
        folder = tmp_path / "xx" / "LC_MESSAGES"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.mo").write_bytes(catalog(entries))
    rows, lost = languages.messages(tmp_path, "xx")
    assert {row["text"] for row in rows} == {"ein Heft", "%d Hefte", "Öffnen bitte"}
    assert {row["source"] for row in rows} == {"one file", "Open it"}
    assert {row["label"] for row in rows} == {"a"}
    assert lost == {"untranslated": 1, "of fewer than 3 letters": 1, "repeated": 2,
                    "of several packages": 1}  # fmt: skip


def catalog(entries) -> bytes:
    """A .mo file, as gettext's manual has it: a header, two tables of (length, offset), strings."""
    pairs = [(k.encode(), v.encode()) for k, v in sorted(entries.items())]
    n = len(pairs)
    tables, strings, at = [[], []], b"", 28 + 16 * n
    for which in (0, 1):
        for pair in pairs:
            tables[which] += [len(pair[which]), at + len(strings)]
            strings += pair[which] + b"\0"
    numbers = [0x950412DE, 0, n, 28, 28 + 8 * n, 0, 28 + 16 * n, *tables[0], *tables[1]]
    return b"".join(x.to_bytes(4, "little") for x in numbers) + strings
