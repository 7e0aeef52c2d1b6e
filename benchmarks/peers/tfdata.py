"""tf.data as TensorFlow's official vision models feed theirs: a fused decode_and_crop_jpeg of a sampled box, resize.

Shuffled files, map with AUTOTUNE, batch, prefetch with AUTOTUNE; a private pool of as many threads as the others have.
Recipe: tensorflow/models official/vision/dataloaders/classification_input.py (random_crop_image_v2, resize bilinear).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from benchmarks.trial import Case, Data, Options

NEEDS = ("tensorflow",)


def cases() -> list[Case]:
    return [Case(f"tf.data {resize}", "tf.data", ("original", "r256"), resize, "tf decode_and_crop_jpeg",
                 extra={"antialias": resize == "antialias"}) for resize in ("fast", "antialias")]


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    def load(path: tf.Tensor) -> tf.Tensor:
        encoded = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded), bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.1, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0), max_attempts=100,
            use_image_if_no_bounding_boxes=True)
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.resize(image, [224, 224], method="bilinear", antialias=case.extra["antialias"])
        return tf.cast(tf.round(image), tf.uint8)

    files = sorted(str(path) for path in Path(data.folder).glob("*/*"))
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    dataset = dataset.batch(options.batch).prefetch(tf.data.AUTOTUNE)
    settings = tf.data.Options()
    settings.threading.private_threadpool_size = options.threads
    for images in dataset.with_options(settings):
        yield int(images.shape[0])
