"""NVIDIA DALI on the CPU, as in its ImageNet examples: readers.file, decoders.image_random_crop, resize.

DALI's own wheel is Apache-2.0 (nvidia/dali/LICENSE of nvidia-dali-cuda130 2.4.0). But it decodes through
nvidia-nvimgcodec-cu13, which it requires and whose terms (LICENSE.txt, 2.11) forbid telling others performance data of
that software. So it runs only with --with-nvidia, and its figures are never recorded.
"""

from __future__ import annotations

from collections.abc import Iterator

from nvidia.dali import fn, pipeline_def, types

from benchmarks.trial import Case, Data, Options

NEEDS = ("nvidia.dali",)


def cases() -> list[Case]:
    return [Case(f"DALI CPU {resize}", "DALI", ("original", "r256"), resize, "DALI image_random_crop (nvImageCodec)",
                 nvidia=True, extra={"antialias": resize == "antialias"}) for resize in ("fast", "antialias")]


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    @pipeline_def(batch_size=options.batch, num_threads=options.threads, device_id=None)
    def pipeline():  # noqa: ANN202 - DALI's own graph type
        encoded, labels = fn.readers.file(file_root=data.folder, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB,
                                               random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0],
                                               num_attempts=100)
        return fn.resize(images, size=[224, 224], interp_type=types.INTERP_LINEAR,
                         antialias=case.extra["antialias"]), labels

    pipe = pipeline()
    pipe.build()
    while True:
        images, _ = pipe.run()
        yield len(images)
