"""Max pooling of channels-last images: the greatest of a window's pixels, lanes along the channels."""

from functools import cache

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Index, chunks, for_each, load, prim_func, product
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish, Writer
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa
from t3c_compile.backends.tvm.kernels.window import Window


@cache
def max_pool2d(
    isa: Isa,
    batch: int | str,
    channels: int,
    window: Window,
    out: tuple[int, int],
    finish: Finish = PLAIN,
    dtype: str = "float32",
) -> tvm.tirx.PrimFunc:
    """(x [N, H, W, C], ``finish`` of [N, *out, C]); no dilation, so that every window holds a pixel.

    ``out`` may be greater than ``window.out`` by one (``ceil_mode``). Images of another ``dtype`` than float32 are
    written as they are.
    """
    shape = (batch, *out, channels)
    (height, width), (kh, kw), (sy, sx) = window.size, window.kernel, window.stride
    with prim_func("max_pool2d") as function:
        x, *ends = function.args(x=((batch, height, width, channels), dtype), **finish.arguments(shape, dtype))
        writer = Writer(finish, ends)
        images = function.size((batch,))

        @for_each(images * out[0], product((images, *out, channels, kh, kw)))
        def _(line: Index) -> None:
            image, y = T.bind(line // out[0]), T.bind(line % out[0])

            # A row or column outside the image is as good as the nearest one in it, which the window holds.
            def nearest(place: Index, size: int) -> Index:
                return T.max(T.min(place, size - 1), 0)

            rows = [
                T.bind((image * height + nearest(y * sy + ky - window.padding[0], height)) * (width * channels))
                for ky in range(kh)
            ]
            with T.serial(0, out[1]) as column:
                columns = [T.bind(nearest(column * sx + kx - window.padding[1], width) * channels) for kx in range(kw)]
                pixels = [T.bind(row + place) for row in rows for place in columns]

                def greatest(i: Index, n: int) -> None:
                    first, *others = pixels
                    best = load(x, first + i, n)
                    for other in others:
                        best = T.max(best, load(x, other + i, n))
                    writer.put((line * out[1] + column) * channels + i, best, n)

                chunks(channels, isa.lanes if dtype == "float32" else QUAD * isa.lanes, greatest)

    return function.func
