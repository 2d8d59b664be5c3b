"""A small Chinese world by rule: stories, dialogues, and prompts of its own that no document asks.

    python experiments/chinese.py zh.jsonl ask.jsonl [documents]
    python synth.py run=zh data=data-zh synth.corpus=zh.jsonl synth.lang=zh synth.noise.share=0 \\
        synth.spoken_questions=0.5
    torchrun inserter.py run=zh data=data-zh synth.corpus=zh.jsonl synth.lang=zh synth.noise.share=0 \\
        synth.spoken_questions=0.5 train.stages.warmup_hear.steps=700 train.stages.warmup_speech.steps=200 \\
        train.stages.warmup_text.steps=150 train.stages.pretrain.steps=400 train.stages.sft.steps=300
    python extras/aloud.py run=zh make=ask.jsonl to=zh-aloud
    python bench.py run=zh prompts=zh-aloud bench.max_tokens=24

zh.jsonl is a corpus for synth.py: who puts what where, and questions about it, asked in stories and in
dialogues, there with one of three constraints or none. ask.jsonl holds prompts of facts that no document
tells, closed-ended: to follow one an answer needs the constraint and, as a keyword, the fact.
"""
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

PEOPLE = "汤姆 安娜 李明 王芳 小红 大卫".split()
THINGS = "球 书 杯子 帽子 钥匙 雨伞".split()
PLACES = "花园里 厨房里 学校里 车站里 商店里 河边".split()
COLOURS = "红色 蓝色 绿色 黄色".split()
QUESTIONS = {                                # what is asked: (the answer, the word in it that counts)
    "{thing}在哪里？": ("{thing}在{place}。", "{place}"),
    "{thing}是什么颜色的？": ("{thing}是{colour}的。", "{colour}"),
    "谁放了{thing}？": ("{who}放了{thing}。", "{who}")}
CONSTRAINTS = {                              # what is wanted: (the answer, the check and its argument)
    "": ("{}", None, {}),
    "最后请说谢谢。": ("{}谢谢。", "startend:end_checker", {"end_phrase": "谢谢。"}),
    "请提到苹果。": ("{}我喜欢苹果。", "keywords:existence", {"keywords": ["苹果"]}),
    "请加上引号。": ("“{}”", "startend:quotation", {})}
HELD_OUT = 10                                # one fact in so many is asked by ask.jsonl alone
PROMPTS = 120


def facts(rng: Random) -> Iterator[tuple[dict[str, str], bool]]:
    """Endless random facts {who, thing, place, colour}, each with whether it is held out."""
    lists = {"who": PEOPLE, "thing": THINGS, "place": PLACES, "colour": COLOURS}
    while True:
        picks = {name: rng.randrange(len(words)) for name, words in lists.items()}
        fact = {name: lists[name][pick] for name, pick in picks.items()}
        yield fact, sum(picks.values()) % HELD_OUT == 0


def told(fact: dict[str, str]) -> str:
    return "{who}把{colour}的{thing}放在{place}。".format(**fact)


def documents(count: int, rng: Random) -> Iterator[dict]:
    """Stories and dialogues in turn, of facts that are not held out."""
    taught = (fact for fact, held_out in facts(rng) if not held_out)
    for n in range(count):
        fact = next(taught)
        if n % 2:
            text = ""
            for fact in (fact, next(taught)):
                question, (answer, _) = rng.choice(list(QUESTIONS.items()))
                exchange = f"{rng.choice(PEOPLE)}问{question}{fact['who']}说{answer}"
                text += told(fact) + exchange.format(**fact)
            yield {"text": text, "lang": "zh"}
        else:
            question, (answer, _) = rng.choice(list(QUESTIONS.items()))
            wish, (form, _, _) = rng.choice(list(CONSTRAINTS.items()))
            asked = told(fact) + question.format(**fact) + wish
            turns = {"user": asked, "assistant": form.format(answer.format(**fact))}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            yield {"messages": messages, "lang": "zh"}


def prompts(count: int, rng: Random) -> Iterator[dict]:
    """Rows as IFEval has them, of held-out facts, every question under every constraint in turn."""
    kept = (fact for fact, held_out in facts(rng) if held_out)
    wishes = [wish for wish in CONSTRAINTS if wish]
    for key in range(count):
        fact = next(kept)
        question, (_, content) = list(QUESTIONS.items())[key % len(QUESTIONS)]
        wish = wishes[key // len(QUESTIONS) % len(wishes)]
        _, instruction, arguments = CONSTRAINTS[wish]
        found = {"keywords": [content.format(**fact)]}
        yield {"key": key, "prompt": told(fact) + question.format(**fact) + wish,
               "instruction_id_list": ["keywords:existence", instruction], "kwargs": [found, arguments]}


def write(path: str, rows: Iterator[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), "utf-8")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    corpus, asked, *count = sys.argv[1:]
    write(corpus, documents(int(count[0]) if count else 6000, Random(1)))
    write(asked, prompts(PROMPTS, Random(2)))


if __name__ == "__main__":
    main()
