"""What a recipe may say about judging pictures against texts (see `dinov3.evals.text_report`)."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from dinov3.config.base import Count, Ordered, Section, require

Names = Annotated[tuple[str, ...], Field(min_length=1)]


class OpenVocabularyConfig(Section):
    """Segmentation by the nearest class name, on composites."""

    scene_size: Count  # side of a scene and of its mask, pixels
    num_scenes: Count
    num_objects: Annotated[tuple[Count, Count], Ordered]  # of a scene: fewest, most
    backgrounds: str | None  # source of photographs, kind:path; None: those of scikit-image
    background_names: Names  # what else the photographs may be called
    resize: Count  # side the model sees, pixels
    window: Count  # side of a sliding window, pixels
    stride: Count  # from one window to the next, pixels


class TextEvalsConfig(Section):
    """Zero-shot classification, image-text retrieval, open-vocabulary segmentation."""

    resize: Count  # as EvalsConfig.resize, for both towers' pictures
    crop: Count
    class_names: dict[str, Names]  # by label, where the label itself is no good name
    ks: Annotated[tuple[Count, ...], Field(min_length=1)]  # of R@k
    num_pictures: Count | None  # of image-text retrieval, the first ones; None: all
    num_shuffles: Count  # draws of the shuffled captions and names
    open_vocabulary: OpenVocabularyConfig

    @model_validator(mode="after")
    def _windows_overlap(self) -> Self:
        scenes = self.open_vocabulary
        require(
            scenes.stride <= scenes.window <= scenes.resize,
            f"text.open_vocabulary: stride <= window <= resize is needed, got {scenes.stride}, "
            f"{scenes.window} and {scenes.resize}. Change them.",
        )
        return self
