"""Vertex AI, in the fields of MedSigLIP's official container (Google-Health/medsiglip 56b1447,
python/serving, instance.yaml and prediction.yaml).

What differs: an instance that cannot be answered does not harm the others; addresses are fetched
only where the server allows them, and tokens in requests are not used. What lies beyond a slide is
white, as everywhere here, and not black.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.serve.addresses import LONGEST
from medsiglip_jax.serve.errors import (
    CREDENTIALS,
    INVALID_FIELD,
    InstanceError,
    RequestError,
    wrong_field,
)
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import NOT_JSON, endpoint
from medsiglip_jax.serve.instances import Instance, Level, Patch, Picture, Reading, Text
from medsiglip_jax.serve.openapi import (
    INTEGER,
    NUMBER,
    ONE_PIXEL,
    STRING,
    VECTOR,
    Described,
    Operation,
    array,
    either,
    obj,
    optional,
)
from medsiglip_jax.serve.service import Service, Vectors, unit
from medsiglip_jax.serve.state import State

# Where the clients of Vertex AI send the same over REST.
ALIAS = "/v1/projects/{project}/locations/{location}/endpoints/{endpoint}:predict"
_SOURCES = ("input_bytes", "image_url", "gcs_uri", "dicomweb_uri")
_FORMS = {
    "image_url": r"https?://.+",
    "gcs_uri": r"gs://[^/]+(/[^/]+)*/[^/]+\.[^/]+",  # quadratic in its length
    "dicomweb_uri": r"https://.+/studies/[0-9.]{1,64}/series/[0-9.]{1,64}/instances/[0-9.]{1,64}",
}
_OTHER = (
    "access_credential", "patch_coordinates_list", "radiology_dicom_window_level",
    "openslide_pyramid_level", "extensions",
)  # fmt: skip
# Hints of the official container that change no pixel here.
_HINTS = ("load_whole_slide_frame_ratio", "ez_wsi_state")
_EXTENSIONS = ("require_patches_fully_in_source_image", "image_dimensions",
               "transform_imaging_to_icc_profile", *_HINTS)  # fmt: skip
_PATCH = ("x_origin", "y_origin", "width", "height")
_SIDE = 448  # of a patch that does not say


def routes(state: State) -> Sequence[Described]:
    """The route of predictions, and its alias of the REST API."""
    answer = endpoint(state, _predict, _failed)
    return [Described(path, answer, _PREDICT) for path in (state.settings.predict_route, ALIAS)]


def _failed(error: RequestError) -> Any:
    return {"error": "No JSON body." if error.message == NOT_JSON else error.message}


async def _predict(service: Service, document: Any, request: Request) -> Any:
    if not isinstance(document, dict) or "instances" not in document:
        raise RequestError(400, "No instances field in request.")
    rules = service.bounded(Rules("official"))
    given = [_instance(fields, rules) for fields in Fields(document).objects("instances")]
    answers = await service.embed(given)
    return {
        "predictions": [_prediction(service, i, a) for i, a in zip(given, answers, strict=True)]
    }


def _instance(fields: Fields, rules: Rules) -> Instance | InstanceError:
    fields.only("text", "image")
    if ("text" in fields) == ("image" in fields):
        raise wrong_field(fields.where, "expected exactly one of text and image")
    if "text" in fields:
        return Text(fields.get("text", str))
    try:
        return _picture(fields.fields("image"), rules)
    except InstanceError as error:
        return error


def _picture(fields: Fields, rules: Rules) -> Picture:
    """Raises RequestError for what the schema does not allow, and InstanceError for the rest."""
    fields.only(*_SOURCES, *_OTHER)
    sources = [name for name in _SOURCES if name in fields]
    if len(sources) != 1:
        raise wrong_field(fields.where, f"expected exactly one of {', '.join(_SOURCES)}")
    [source] = sources
    value = fields.get(source, str)
    if source in _FORMS:
        _check_address(fields.at(source), value, _FORMS[source])
    patches = tuple(_patch(patch) for patch in _patches(fields))
    _check_credential(fields, source)
    level = _level(fields, source)
    inside, resized = _extensions(fields)
    reading = Reading("serving", _with_window(fields, rules))
    content, address = (value, None) if source == "input_bytes" else (None, value)
    windowed = "radiology_dicom_window_level" in fields
    return Picture(content, address, patches, inside, resized, reading, level, windowed)


def _check_address(where: str, value: str, form: str) -> None:
    if len(value) > LONGEST:
        raise wrong_field(where, f"expected at most {LONGEST:,} characters")
    if not re.fullmatch(form, value):
        raise wrong_field(where, f"expected the form {form}")


def _level(fields: Fields, source: str) -> Level | None:
    if "openslide_pyramid_level" not in fields:
        return None
    if source in ("input_bytes", "dicomweb_uri"):
        raise wrong_field(fields.at("openslide_pyramid_level"), f"not with {source}")
    level = fields.fields("openslide_pyramid_level")
    if "index" in level:
        level.only("index")
        return Level(level.number("index", -(1 << 31)))
    level.only("width", "height")
    return Level(least=(level.number("width", 1), level.number("height", 1)))


def _patches(fields: Fields) -> list[Fields]:
    if "patch_coordinates_list" not in fields:
        return []
    patches = list(fields.objects("patch_coordinates_list"))
    if not patches:
        raise wrong_field(fields.at("patch_coordinates_list"), "expected at least one")
    return patches


def _patch(fields: Fields) -> Patch:
    fields.only(*_PATCH)
    x, y = fields.number("x_origin", 0), fields.number("y_origin", 0)
    return Patch(x, y, fields.number("width", 1, _SIDE), fields.number("height", 1, _SIDE))


def _check_credential(fields: Fields, source: str) -> None:
    """What the server itself may read needs none; a token of the request is used for nothing."""
    given = fields.get("access_credential", str, "application_default")
    if source == "input_bytes" and "access_credential" in fields:
        raise wrong_field(fields.at("access_credential"), "not with input_bytes")
    if given != "application_default":
        problem = "this server uses its own credentials; expected application_default, or none"
        raise InstanceError(CREDENTIALS, problem)


def _with_window(fields: Fields, rules: Rules) -> Rules:
    if "radiology_dicom_window_level" not in fields:
        return rules
    window = fields.fields("radiology_dicom_window_level")
    window.only("center", "width")
    center, width = window.get("center", int), window.number("width", 1)
    if not -(1 << 31) < center < 1 << 31:
        raise wrong_field(window.at("center"), "expected a whole number of 32 bits")
    return replace(rules, ct_window=(width, center))


def _extensions(fields: Fields) -> tuple[bool, tuple[int, int] | None]:
    """Whether patches have to lie in the image, and the size that it is resized to before."""
    if "extensions" not in fields:
        return True, None
    extensions = fields.fields("extensions")
    extensions.only(*_EXTENSIONS)
    profile = extensions.get("transform_imaging_to_icc_profile", str, "NONE")
    if profile.upper() != "NONE":
        raise InstanceError(
            INVALID_FIELD, "this server transforms no colour profiles; expected NONE"
        )
    size = None
    if "image_dimensions" in extensions:
        dimensions = extensions.fields("image_dimensions")
        size = dimensions.number("width", 1), dimensions.number("height", 1)
    return _inside(extensions), size


def _inside(extensions: Fields) -> bool:
    name = "require_patches_fully_in_source_image"
    if name not in extensions:
        return True
    kind = bool if extensions.is_a(name, bool) else str
    value = str(extensions.get(name, kind)).lower()
    if value not in ("true", "false"):
        raise InstanceError(INVALID_FIELD, f"{extensions.at(name)}: expected true or false")
    return value == "true"


def _prediction(
    service: Service, instance: Instance | InstanceError, answer: Vectors | InstanceError
) -> Any:
    if isinstance(answer, InstanceError):
        return {"error": answer.to_dict()}
    vectors = [vector.tolist() for vector in unit(answer)]
    kind = "text" if isinstance(instance, Text) else "image"
    facts = {"input_type": kind, **_scale(service)}
    if not isinstance(instance, Picture) or not instance.patches:
        return {"embedding": vectors[0], **facts}
    places = [dict(zip(_PATCH, (p.x, p.y, p.width, p.height), strict=True))
              for p in instance.patches]  # fmt: skip
    patches = [
        {"embedding": vector, "patch_coordinate": place}
        for vector, place in zip(vectors, places, strict=True)
    ]
    return {"patch_embeddings": patches, **facts}


def _scale(service: Service) -> dict[str, float | None]:
    t, b = service.scale or (None, None)
    return {"model_temperature": t, "model_bias": b}


_PLACE = obj({"x_origin": INTEGER, "y_origin": INTEGER}, {"width": INTEGER, "height": INTEGER})
_IMAGE = obj({}, {
    **dict.fromkeys(_SOURCES, STRING), "access_credential": STRING,
    "patch_coordinates_list": array(_PLACE),
    "radiology_dicom_window_level": obj({"center": INTEGER, "width": INTEGER}),
    "extensions": {"type": "object"},
})  # fmt: skip
_SCALE = {"input_type": {"enum": ["text", "image"]}, "model_temperature": optional(NUMBER),
          "model_bias": optional(NUMBER)}  # fmt: skip
_PATCHES = array(obj({"embedding": VECTOR, "patch_coordinate": _PLACE}))
_PREDICT = Operation(
    "Normalised embeddings of texts, of images, and of patches of images, as MedSigLIP's container "
    "on Vertex AI answers; the logit is exp(model_temperature) * cosine + model_bias",
    body=obj({"instances": array(either(obj({"text": STRING}), obj({"image": _IMAGE})))}),
    example={"instances": [{"text": "a chest x-ray"}, {"image": {"input_bytes": ONE_PIXEL}}]},
    answer=obj({"predictions": array(either(
        obj({"embedding": VECTOR, **_SCALE}),
        obj({"patch_embeddings": _PATCHES, **_SCALE}),
        obj({"error": obj({"code": STRING, "description": STRING})}),
    ))}),
)  # fmt: skip
