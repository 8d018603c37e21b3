"""MiniWoB: small tasks on web pages, done with the mouse and the keyboard by who sees the screen.

Shi et al., "World of Bits: An Open-Domain Platform for Web-Based Agents", 2017; Liu et al., "Reinforcement Learning on
Web Interfaces using Workflow-Guided Exploration", 2018. The pages are those of the package ``miniwob``.

**Deviations**: the reward is the page's own without the decay over wall time, and episodes end after a count of acts
and not of seconds, so that a slow machine gives the same results; animations of jQuery jump to their ends; a finished
page stays as it is instead of being covered.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32
from PIL import Image as PILImage

from polymodal.act.envs import check_task
from polymodal.act.envs.base import Action, Picture, RobotEnv, is_swapped
from polymodal.act.envs.web.actions import (
    HIGH,
    LOW,
    NAMES,
    WAIT,
    MalformedAction,
    ScreenAction,
    from_vector,
    parse,
    to_vector,
    within,
)
from polymodal.act.envs.web.browser import HOST, Browser, BrowserError
from polymodal.act.envs.web.oracles import ORACLES, script
from polymodal.core.errors import ConfigError, MissingDependency, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTH, HEIGHT = 160, 210
NOTCH: Final = 30  # pixels that a notch of the wheel scrolls
# The page is larger than what is shown, so that nothing in the picture depends on the window's edges.
WINDOW: Final = {"width": 500, "height": 320}

_START: Final = """(seed) => {
  core.startEpisode = () => {};  // no cover over a finished page
  core.EPISODE_MAX_TIME = 1e9;
  if (window.jQuery) jQuery.fx.off = true;
  Math.seedrandom(seed);
  core.startEpisodeReal();
  window.polymodal = true;  // gone when the page is left or loaded again
  return core.getUtterance();
}"""
_STATE: Final = "() => window.polymodal ? [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL] : null"


@cache
def pages() -> Path:
    """The folder of the pages.

    Raises:
        MissingDependency: the package is not installed.
    """
    found = importlib.util.find_spec("miniwob")
    if found is None or not found.submodule_search_locations:
        raise MissingDependency("MiniWoB", "miniwob", "miniwob")
    return Path(found.submodule_search_locations[0]) / "html"


def tasks() -> list[str]:
    """The names of all tasks; those in `ORACLES` have a demonstrator."""
    return sorted(path.stem for path in (pages() / "miniwob").glob("*.html"))


class MiniWoB(RobotEnv):
    """One task. The same seed gives the same page, and all environments of a process share one browser.

    The state is the place of the pointer, which the picture does not show. An action is a vector of `NAMES`, a
    `ScreenAction` or its text. ``info`` has beside ``instruction`` and ``success`` why an action was ``malformed``, and
    nothing was done; and the ``failure`` of the browser that cut an episode off: the next `reset` starts another.

    Args:
        task: one of `tasks`.
        size: width of the picture in pixels, a multiple of 32 (films take even sides) from 160 on; it is 21/16 as high.
        steps: acts after which an episode is cut off.

    Raises:
        ConfigError: no such task, or an impossible size.
        MissingDependency: the package ``miniwob`` is not installed.
    """

    known_cameras = ("screen",)
    fps = 2  # nominal: an act takes what it takes, `wait` half a second
    state_names = ("pointer_x", "pointer_y")
    action_names = NAMES

    def __init__(
        self, task: str = "click-test", *, size: int = WIDTH, cameras: Sequence[str] | None = None, steps: int = 30
    ) -> None:
        check_task("miniwob", task, tasks())
        if size % 32 or size < WIDTH or steps < 1:
            raise ConfigError(f"size is a multiple of 32 from {WIDTH} on and steps at least 1, not {size} and {steps}")
        super().__init__(size=size, cameras=cameras, action_space=spaces.Box(LOW, HIGH))
        self.task, self.steps = task, steps
        picture = spaces.Box(0, 255, (size * HEIGHT // WIDTH, size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict(dict.fromkeys(self.cameras, picture)),
                "state": spaces.Box(0, 1, (2,), np.float32),
            }
        )
        self._browser: Browser | None = None
        self._page: Page | None = None
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Loads the page anew.

        Raises:
            UnsupportedError: it cannot be swapped; or there is no Chromium.
            MissingDependency: Playwright is not installed.
            BrowserError: a browser that was just started failed.
        """
        if is_swapped(options):
            raise self.cannot_swap("a page of MiniWoB chooses and writes its own")
        super().reset(seed=seed)
        chosen = int(self.np_random.integers(2**31))
        try:
            self._do(lambda page: self._load(page, chosen))
        except BrowserError:  # it may have died long ago
            self._forget()
            self._do(lambda page: self._load(page, chosen))
        self._taken, self._running, self._success = 0, True, False
        return self.observe(), self._info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carries out one act; a malformed one does nothing, and counts as a step."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("reset() comes before step(), also after the end of an episode")
        self._taken += 1
        malformed = failure = ""
        done, reward = False, 0.0
        try:
            act = _action(action)
            state = self._do(lambda page: self._perform(page, act))
            if state is None:
                failure = "the page was left"
            else:
                done, reward = bool(state[0]), float(state[1])
        except MalformedAction as e:
            malformed = str(e)
        except BrowserError as e:
            failure = str(e)
            self._forget()
        self._success = done and reward >= 1
        cut = not done and (bool(failure) or self._taken >= self.steps)
        self._running = not (done or cut)
        return self.observe(), reward if done else 0.0, done, cut, self._info(malformed, failure)

    def expert(self) -> Callable[[], Action]:
        """The demonstrator of the running episode.

        Raises:
            UnsupportedError: the task has none.
            BrowserError: by the call: the browser failed, or the page is none that the demonstrator knows.
        """
        if self.task not in ORACLES:
            raise UnsupportedError(f"{self.task} has no demonstrator{did_you_mean(self.task, ORACLES)}")
        code = script(self.task)
        return lambda: to_vector(self._do(lambda page: self._advice(page, code)))

    def picture(self, camera: str) -> Picture:
        return self._picture

    def state(self) -> Float32[np.ndarray, " 2"]:
        return np.array(self._pointer, np.float32)

    def close(self) -> None:
        if self._browser is not None and self._page is not None:
            self._browser.release(self._page)
        self._forget()
        self._running = False

    # -- in the browser

    def _do(self, work: Callable[[Page], Any]) -> Any:
        if self._browser is None or self._page is None:
            self._browser = Browser.shared(pages())
            self._page = self._browser.open(**WINDOW, scale=self.size / WIDTH)
        page = self._page
        return self._browser.do(lambda: work(page))

    def _forget(self) -> None:
        self._browser = self._page = None

    def _load(self, page: Page, seed: int) -> None:
        page.mouse.move(0, 0)
        page.goto(f"http://{HOST}/miniwob/{self.task}.html")
        self._instruction: str = page.evaluate(_START, seed)
        self._pointer = (0.0, 0.0)
        self._look(page)

    def _look(self, page: Page) -> None:
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT}
        png = page.screenshot(clip=clip)  # type: ignore[arg-type]
        self._picture = np.array(PILImage.open(io.BytesIO(png)).convert("RGB"))

    def _perform(self, page: Page, act: ScreenAction) -> list[Any] | None:
        mouse, numbers = page.mouse, act.numbers
        if act.kind == "wait":
            page.wait_for_timeout(1000 / self.fps)
        elif act.kind == "type":
            page.keyboard.type(act.text)
        elif act.kind == "press":
            page.keyboard.press(act.text)
        elif act.kind == "scroll":
            mouse.wheel(NOTCH * numbers[0], NOTCH * numbers[1])
            page.wait_for_timeout(100)  # the wheel is handled later than the other events
        else:
            self._pointer = (numbers[-2], numbers[-1])
            x, y = within((numbers[0], numbers[1]), (WIDTH, HEIGHT))
            mouse.move(x, y)
            if act.kind == "drag":
                mouse.down()
                mouse.move(*within(self._pointer, (WIDTH, HEIGHT)), steps=5)
                mouse.up()
            elif act.kind != "move":
                mouse.click(
                    x,
                    y,
                    button="right" if act.kind == "right_click" else "left",
                    click_count=2 if act.kind == "double_click" else 1,
                )
        if self._told(page) is None:  # nothing to look at: a page on its way may show no picture
            return None
        self._look(page)
        return self._told(page)

    def _told(self, page: Page) -> list[Any] | None:
        """Whether the episode is done, and the reward; None where the page was left or is being left."""
        from playwright.sync_api import Error

        try:
            return page.evaluate(_STATE)
        except Error as e:
            if "context was destroyed" in e.message:
                return None
            raise

    def _advice(self, page: Page, code: str) -> ScreenAction:
        said = page.evaluate(code, list(within(self._pointer, (WIDTH, HEIGHT))))
        if said is None:
            return WAIT
        kind, *rest = said
        if kind == "lost":
            raise BrowserError(f"the demonstrator of {self.task} does not know this page: {rest[0]}")
        if rest and isinstance(rest[0], str):
            return ScreenAction(kind, text=rest[0])
        if kind == "scroll":
            return ScreenAction(kind, tuple(map(float, rest)))
        parts = [min(max(n / side, 0.0), 1.0) for n, side in zip(rest, (WIDTH, HEIGHT) * 2, strict=False)]
        return ScreenAction(kind, tuple(parts))

    def _info(self, malformed: str = "", failure: str = "") -> dict[str, Any]:
        return {
            "instruction": self._instruction,
            "success": self._success,
            "malformed": malformed,
            "failure": failure,
        }


def _action(action: Any) -> ScreenAction:
    if isinstance(action, ScreenAction):
        return action
    return parse(action) if isinstance(action, str) else from_vector(np.asarray(action))
