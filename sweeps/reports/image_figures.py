"""Figures of a run's images: synthetic images, their spectra, class activation maps, attention.

Each function takes plain arrays, or the reason why there are none, and returns a figure or a gap with the reason.
"""

import functools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from synq.diagnostics.probe_parts import SIMILARITY_BINS, Attention, ImageGrid, Maps, Spectra

from .drawing import WIDTH, draw, panels
from .page import Figure, Gap


def image_grids(grid: ImageGrid | str, cutoff: str) -> list[Figure | Gap]:
    """Return figures of synthetic images by class, before and after the low-pass filter (paper, Fig. 1)."""
    if isinstance(grid, str):
        return [Gap(title="Synthetic images before and after the low-pass filter", reason=grid)]
    classes, each = grid.before.shape[:2]

    def plot(canvas: Canvas, images: np.ndarray) -> None:
        axes = canvas.subplots()
        _show_tiles(axes, images)
        axes.set_yticks([(i + 0.5) * images.shape[2] for i in range(classes)], [str(c) for c in grid.classes])
        axes.set_ylabel("class")

    caption = (
        f"{each} images of each of {classes} classes, of {grid.num_images} in the set. Filter: {cutoff}. "
        f"{100 * grid.clipped:.0f} % of the pixels are outside the range from black to white; they are clipped in this "
        "figure only, not in the run." + ("" if grid.channels in (1, 3) else f" First of {grid.channels} channels.")
    )
    tile = (WIDTH - 0.5) / each  # width of one image in inches
    height = 0.1 + classes * tile * grid.before.shape[2] / grid.before.shape[3]
    size = WIDTH, min(6.5, max(1.6, height))
    before, after = functools.partial(plot, images=grid.before), functools.partial(plot, images=grid.after)
    short = f"The same images after the filter ({cutoff})."
    return [
        draw("images", "Synthetic images before the low-pass filter", caption, before, size, pixels=True),
        draw("images-filtered", "Synthetic images after the low-pass filter", short, after, size, pixels=True),
    ]


def _show_tiles(axes: Axes, images: np.ndarray) -> None:
    rows, columns, height, width, channels = images.shape
    tiles = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    axes.imshow(
        _pixels(tiles),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, columns * width, rows * height, 0),
    )
    axes.set_xticks([])
    axes.grid(False)


def _pixels(image: np.ndarray) -> np.ndarray:
    return image if image.shape[-1] == 3 else image[..., 0]


def spectra(found: Spectra | str) -> list[Figure | Gap]:
    """Return figures of amplitude spectra and of their radial profiles (paper, Figs. 1 and 5)."""
    title = "Amplitude spectra"
    if isinstance(found, str):
        return [Gap(title=title, reason=found)]
    counts = ", ".join(f"{name} n = {count}" for name, count in found.counts.items())
    levels = {name: np.log10(np.maximum(part, 1e-12)) for name, part in found.amplitudes.items()}
    low, high = min(map(np.min, levels.values())), max(map(np.max, levels.values()))

    def plot_maps(canvas: Canvas) -> None:
        axes_list = panels(canvas, len(levels), columns=3)
        for axes, (name, level) in zip(axes_list, levels.items(), strict=True):
            height, width = level.shape
            edges = (-width / 2, width / 2, height / 2, -height / 2)
            shown = axes.imshow(level, vmin=low, vmax=high, cmap="viridis", extent=edges)
            axes.set_title(name.partition(" (")[0])
            axes.locator_params(nbins=4, integer=True)
            axes.grid(False)
        axes_list[0].set_ylabel("vertical DFT bins")
        axes_list[len(levels) // 2].set_xlabel("horizontal DFT bins")
        canvas.colorbar(shown, ax=axes_list, label="log10 mean amplitude", location="bottom", aspect=40)

    def plot_profiles(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for name, profile in found.profiles.items():
            axes.plot(profile, label=name)
        if found.cutoff is not None and found.cutoff < len(next(iter(found.profiles.values()))):
            axes.axvline(found.cutoff, color="#4f5d73", linestyle="--", label=f"cutoff D0 = {found.cutoff:.3g} bins")
        axes.set(yscale="log", xlabel="distance from zero frequency [DFT bins]", ylabel="mean amplitude")
        axes.legend()

    spectrum = "Magnitude of the two-dimensional DFT, mean over images and channels, zero frequency in the center"
    radial = "Means of the spectra over rings; the low-pass filter lowers the right part."
    return [
        draw("spectra", title, f"{spectrum} ({counts}).", plot_maps, (WIDTH, 2.6), pixels=True),
        draw("spectrum-profile", "Radial profile of the spectra", f"{radial} {counts}.", plot_profiles),
    ]


def cam_overlays(found: Maps | str) -> Figure | Gap:
    """Return a figure of the class activation maps of several networks on the same images (paper, Fig. 2)."""
    title = "Class activation maps"
    if isinstance(found, str):
        return Gap(title=title, reason=found)
    caption = (
        f"Grad-CAM of the label on {len(found.images)} {found.source}, not normalized, large values bright, one color "
        "scale per column. The maps of a fine-tuned student should resemble the teacher's more than those before "
        "fine-tuning do."
    )
    return _overlays("cam", title, caption, found)


def attention_figures(found: Attention | str | None) -> list[Figure | Gap]:
    """Return figures of attention as maps and of the similarities of tokens; none for a network without attention."""
    title = "Attention"
    if found is None:
        return []
    if isinstance(found, str):
        return [Gap(title=title, reason=found)]
    counts = ", ".join(f"{name} n = {count}" for name, count in found.counts.items())
    centers = np.linspace(-1, 1, SIMILARITY_BINS + 1)[:-1] + 1 / SIMILARITY_BINS

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for name, shares in found.similarities.items():
            axes.plot(centers, 100 * shares, label=name, linestyle="--" if name == "Gaussian noise" else "-")
        axes.set(xlabel="cosine between two tokens of an image", ylabel="pairs [%]", xlim=(-1, 1), ylim=(0, None))
        axes.legend()

    caption = (
        "Tokens that the teacher's attention gathers. On images with distinct things tokens form groups, and the curve "
        f"is wide; on noise it is narrow. {counts}."
    )
    maps: Figure | Gap = (
        Gap(title=title, reason=found.maps)
        if isinstance(found.maps, str)
        else _overlays(
            "attention",
            title,
            f"Share of each position in {found.place}, on {len(found.maps.images)} {found.maps.source}, large values "
            "bright, one color scale per column.",
            found.maps,
        )
    )
    return [maps, draw("token-similarity", "Similarity of tokens", caption, plot)]


def _overlays(name: str, title: str, caption: str, found: Maps) -> Figure | Gap:
    """Draw images in the first row, and below them the maps of each network over the images."""
    number, names = len(found.images), list(found.maps)
    top = np.maximum(np.max([found.maps[name].max(axis=(1, 2)) for name in names], axis=0), 1e-12)

    def plot(canvas: Canvas) -> None:
        grid = canvas.subplots(len(names) + 1, number, squeeze=False)
        for row, name in enumerate(["image", *names]):
            for column in range(number):
                axes = grid[row, column]
                image = found.images[column]
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                edges = (0, image.shape[1], image.shape[0], 0)
                axes.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1, extent=edges, interpolation="nearest")
                if row:
                    heat = found.maps[name][column] / top[column]
                    axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=edges, interpolation="bilinear")
                else:
                    axes.set_title(f"class {found.labels[column]}", fontsize=8)
                if column == 0:
                    axes.set_ylabel(name.replace(" to ", " to\n"))

    tile = (WIDTH - 0.5) / number
    return draw(name, title, caption, plot, (WIDTH, 0.4 + tile * (len(names) + 1)), pixels=True)
