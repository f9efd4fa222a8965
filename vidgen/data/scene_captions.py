"""Captions of scenes: several templates, in English and in Chinese, each true of the clip that it describes.

What a caption may leave out (sizes, speeds, the background) it leaves out by chance; objects, their motions, a
camera that moves and a cut are always told. Of one frame nothing is told that takes time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vidgen.data.scenes import Background, Camera, Object, Path, Scene

Pick = Callable[..., str]  # one of its arguments


@dataclasses.dataclass(frozen=True)
class _Tell:
    """Which of the optional facts a caption tells."""

    size: bool
    speed: bool
    ground: bool


def describe(
    scene: Scene, rng: np.random.Generator, language: str = "en", *, moving: bool = True, limit: int = 240
) -> str:
    """A true caption of a scene.

    Args:
      scene: what the clip shows.
      rng: picks the template and what is left out.
      language: en | zh.
      moving: False for a clip of one frame.
      limit: bytes in UTF-8; optional facts are left out until it fits. Below 48 the caption is a short one.

    Raises ValueError where even the barest caption is longer than `limit`.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: expected one of {tuple(LANGUAGES)}")
    say = LANGUAGES[language]
    tell = _Tell(*(rng.random(3) < 0.5).tolist()) if limit >= 48 else _Tell(False, False, False)
    draws = rng.random(16)

    def attempt(tell: _Tell) -> str:
        rest = iter(draws)  # the same templates at each attempt
        return say(scene, moving, tell, lambda *options: options[int(next(rest) * len(options))])

    for drop in ((), ("speed",), ("speed", "size"), ("speed", "size", "ground")):
        text = attempt(dataclasses.replace(tell, **dict.fromkeys(drop, False)))
        if len(text.encode()) <= limit:
            return text
    raise ValueError(f"caption of {len(text.encode())} bytes, expected at most {limit}: {text}")


def _edge(path: Path) -> str:
    """Which edge of the frame a bouncing object turns back from."""
    x, y = path.travel
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "bottom" if y > 0 else "top"


# English


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_EN_WAYS = {
    "right": "to the right",
    "left": "to the left",
    "up": "up",
    "down": "down",
    "up-right": "up and to the right",
    "up-left": "up and to the left",
    "down-right": "down and to the right",
    "down-left": "down and to the left",
}


def _en_noun(thing: Object, tell: _Tell) -> str:
    size = {"small": "small ", "medium": "medium-sized ", "large": "large "}[thing.size] if tell.size else ""
    return f"{size}{thing.colour} {thing.shape}"


def _en_verb(path: Path, tell: _Tell, pick: Pick) -> str:
    if path.motion == "still":
        return pick("stays still", "does not move")
    speed = {"slow": " slowly", "fast": " quickly"}[path.speed] if tell.speed else ""
    if path.motion == "circle":
        turn = pick("", " clockwise" if path.sweep > 0 else " counterclockwise")
        return f"moves{speed} in a circle{turn}"
    if path.motion == "bounce":
        return f"bounces off the {_edge(path)} edge"
    return f"{pick('moves', 'goes', 'travels')}{speed} {_EN_WAYS[path.motion]}"


def _en_ground(ground: Background) -> str:
    first, last = ground.colours[0], ground.colours[-1]
    return {
        "plain": f"{_a(first)} background",
        "gradient": f"a background fading from {first} to {last}",
        "noise": f"a mottled {first} and {last} background",
        "checker": f"a {first} and {last} checkerboard",
        "grid": f"{_a(first)} background with a {last} grid",
    }[ground.kind]


def _en_camera(camera: Camera) -> str:
    if camera.kind == "pan":
        x, y = camera.pan
        way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
        return f"the camera pans {way}"
    if camera.kind == "zoom":
        return f"the camera zooms {'in' if camera.zoom > 0 else 'out'}"
    return f"the picture turns {'clockwise' if camera.rotate > 0 else 'counterclockwise'}"


def _english_list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _english(scene: Scene, moving: bool, tell: _Tell, pick: Pick) -> str:
    nouns = [_en_noun(thing, tell) for thing in scene.objects]
    shot = scene.shots[0]
    ground = f" on {_en_ground(shot.background)}" if tell.ground else ""
    article = pick(_a, _a, lambda noun: f"the {noun}")
    if not moving:
        return pick("", "an image of ") + _english_list([_a(noun) for noun in nouns]) + ground
    if len(scene.shots) == 2:
        verbs = [_en_verb(s.paths[0], tell, pick) for s in scene.shots]
        grounds = [f" on {_en_ground(s.background)}" if tell.ground else "" for s in scene.shots]
        template = pick("{} {}{}; cut: it {}{}", "first, {} {}{}; then, after a cut, it {}{}")
        return template.format(article(nouns[0]), verbs[0], grounds[0], verbs[1], grounds[1])
    if scene.event == "collision":
        text = f"{article(nouns[0])} and {article(nouns[1])} " + pick(
            "bounce off each other", "collide and bounce apart", "move together, collide and turn back"
        )
    elif scene.event == "occlusion":
        verb = _en_verb(shot.paths[0], tell, pick)
        text = f"{article(nouns[0])} {verb}, passing behind {article(nouns[1])}" + pick(" that stays still", " at rest")
    elif len(nouns) == 1 and shot.paths[0].motion in _EN_WAYS:
        verb = _en_verb(shot.paths[0], tell, pick)
        _, _, rest = verb.partition(" ")
        text = f"{article(nouns[0])} " + pick(verb, f"moving {rest}")
    else:
        clauses = [f"{article(n)} {_en_verb(p, tell, pick)}" for n, p in zip(nouns, shot.paths, strict=True)]
        text = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, {pick('and', 'while')} {clauses[-1]}"
    if tell.ground:
        text += pick(f", on {_en_ground(shot.background)}", f", against {_en_ground(shot.background)}")
    return text + (f"; {_en_camera(shot.camera)}" if shot.camera.kind != "still" else "")


# Chinese

_ZH_COLOURS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "cyan": "青色",
    "orange": "橙色",
    "pink": "粉色",
    "black": "黑色",
    "charcoal": "深灰色",
    "grey": "灰色",
    "white": "白色",
    "navy": "藏青色",
    "brown": "棕色",
    "beige": "米色",
}
_ZH_SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "diamond": "菱形",
    "cross": "十字形",
    "ring": "圆环",
}
_ZH_SIZES = {"small": "小", "medium": "中等大小的", "large": "大"}
_ZH_WAYS = {
    "right": "右",
    "left": "左",
    "up": "上",
    "down": "下",
    "up-right": "右上方",
    "up-left": "左上方",
    "down-right": "右下方",
    "down-left": "左下方",
}
_ZH_EDGES = {"right": "右", "left": "左", "top": "上", "bottom": "下"}


def _zh_noun(thing: Object, tell: _Tell) -> str:
    size = _ZH_SIZES[thing.size] if tell.size else ""
    return f"一个{size}{_ZH_COLOURS[thing.colour]}{_ZH_SHAPES[thing.shape]}"


def _zh_verb(path: Path, tell: _Tell, pick: Pick) -> str:
    if path.motion == "still":
        return pick("静止不动", "保持不动")
    speed = {"slow": "缓慢地", "fast": "快速地"}[path.speed] if tell.speed else ""
    if path.motion == "circle":
        turn = pick("", "顺时针" if path.sweep > 0 else "逆时针")
        return f"{speed}{turn}绕圈移动"
    if path.motion == "bounce":
        return f"碰到画面{_ZH_EDGES[_edge(path)]}边缘后弹回"
    return f"{speed}向{_ZH_WAYS[path.motion]}{pick('移动', '运动')}"


def _zh_ground(ground: Background) -> str:
    first, last = _ZH_COLOURS[ground.colours[0]], _ZH_COLOURS[ground.colours[-1]]
    return {
        "plain": f"{first}背景",
        "gradient": f"从{first}渐变到{last}的背景",
        "noise": f"{first}和{last}相间的斑驳背景",
        "checker": f"{first}和{last}相间的棋盘格背景",
        "grid": f"带{last}网格的{first}背景",
    }[ground.kind]


def _zh_camera(camera: Camera) -> str:
    if camera.kind == "pan":
        x, y = camera.pan
        return f"镜头向{('右' if x > 0 else '左') if abs(x) > abs(y) else ('下' if y > 0 else '上')}平移"
    if camera.kind == "zoom":
        return f"镜头{'拉近' if camera.zoom > 0 else '拉远'}"
    return f"画面{'顺' if camera.rotate > 0 else '逆'}时针旋转"


def _chinese(scene: Scene, moving: bool, tell: _Tell, pick: Pick) -> str:
    nouns = [_zh_noun(thing, tell) for thing in scene.objects]
    shot = scene.shots[0]
    if not moving:
        where = f"{_zh_ground(shot.background)}上有" if tell.ground else pick("", "画面中有")
        return where + "和".join(nouns)
    if len(scene.shots) == 2:
        verbs = [_zh_verb(s.paths[0], tell, pick) for s in scene.shots]
        grounds = [f"在{_zh_ground(s.background)}上" if tell.ground else "" for s in scene.shots]
        template = pick("{}{}{}；切换镜头后，它{}{}", "先是{}{}{}，镜头切换后它{}{}")
        return template.format(nouns[0], grounds[0], verbs[0], grounds[1], verbs[1])
    if scene.event == "collision":
        text = f"{nouns[0]}和{nouns[1]}" + pick("相撞后弹开", "迎面相撞后各自弹回")
    elif scene.event == "occlusion":
        verb = _zh_verb(shot.paths[0], tell, pick)
        text = f"{nouns[0]}{verb}，从{nouns[1]}后面经过，后者{pick('静止不动', '没有移动')}"
    else:
        text = "，".join(f"{n}{_zh_verb(p, tell, pick)}" for n, p in zip(nouns, shot.paths, strict=True))
    if tell.ground:
        text = f"在{_zh_ground(shot.background)}上，{text}"
    return text + (f"，{_zh_camera(shot.camera)}" if shot.camera.kind != "still" else "")


LANGUAGES: dict[str, Callable[[Scene, bool, _Tell, Pick], str]] = {"en": _english, "zh": _chinese}
