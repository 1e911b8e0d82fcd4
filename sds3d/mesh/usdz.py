"""USDZ: a zip, stored without compression and aligned to 64 bytes, of one text layer and its textures.

Written by hand: the library for it (usd-core) is larger than this package, and a scene of one mesh is a page of text.
Source: Pixar, Usdz File Format Specification 1.3; UsdPreviewSurface Specification 2.6.
"""

import io
import zipfile

import numpy as np
from torch import Tensor

from sds3d.mesh.gltf import Metadata, dump_json, png_bytes
from sds3d.mesh.textured import TexturedMesh

ALIGNMENT = 64
EXTRA_ID = 0x1986  # of the padding field; any unassigned number
MATERIAL = "/asset/material"


def encode_usdz(mesh: TexturedMesh, metadata: Metadata) -> bytes:
    """One file that opens in AR viewers: metres, +y up, the front towards +z."""
    pictures = {f"textures/{name}.png": png_bytes(image) for name, image in _textures(mesh).items()}
    return _aligned_zip({"asset.usda": _layer(mesh, metadata).encode(), **pictures})


def _textures(mesh: TexturedMesh) -> dict[str, Tensor]:
    named = {
        "base_color": mesh.texture,
        "metallic_roughness": mesh.metallic_roughness,
        "normal": mesh.normal_texture,
    }
    return {name: image for name, image in named.items() if image is not None}


def _aligned_zip(contents: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            # The data starts behind a header of 30 bytes, the name, and an extra field of 4 bytes and padding.
            start = out.tell() + 30 + len(name.encode()) + 4
            padding = -start % ALIGNMENT
            entry.extra = EXTRA_ID.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
            archive.writestr(entry, data)
    return out.getvalue()


def _layer(mesh: TexturedMesh, metadata: Metadata) -> str:
    uvs = None if mesh.uvs is None else mesh.uvs.numpy() * [1.0, -1.0] + [0.0, 1.0]  # USD counts v upwards
    low, high = mesh.vertices.amin(0).tolist(), mesh.vertices.amax(0).tolist()
    notes = dump_json(dict(metadata)).decode().replace("\\", "\\\\").replace('"', '\\"')
    parts = [
        "#usda 1.0",
        "(",
        f'    customLayerData = {{ string sds3d = "{notes}" }}',
        '    defaultPrim = "asset"',
        "    metersPerUnit = 1",
        '    upAxis = "Y"',
        ")",
        'def Xform "asset" (kind = "component") {',
        '    def Mesh "mesh" (prepend apiSchemas = ["MaterialBindingAPI"]) {',
        '        uniform token subdivisionScheme = "none"',
        f"        uniform bool doubleSided = {int(not mesh.closed)}",
        f"        float3[] extent = [{_tuple(low)}, {_tuple(high)}]",
        f"        int[] faceVertexCounts = [{', '.join(['3'] * len(mesh.faces))}]",
        f"        int[] faceVertexIndices = [{', '.join(map(str, mesh.faces.flatten().tolist()))}]",
        f"        point3f[] points = [{_tuples(mesh.vertices.numpy())}]",
        f'        normal3f[] normals = [{_tuples(mesh.normals.numpy())}] (interpolation = "vertex")',
    ]
    if uvs is not None:
        parts.append(f'        texCoord2f[] primvars:st = [{_tuples(uvs)}] (interpolation = "vertex")')
    parts += [
        f"        rel material:binding = <{MATERIAL}>",
        "    }",
        '    def Material "material" {',
        f"        token outputs:surface.connect = <{MATERIAL}/surface.outputs:surface>",
        *_surface_shader(mesh),
        *_readers(mesh),
        "    }",
        "}",
        "",
    ]
    return "\n".join(parts)


def _surface_shader(mesh: TexturedMesh) -> list[str]:
    has = _textures(mesh)

    def inputs(kind: str, name: str, texture: str, output: str, value: str) -> str:
        if texture in has:
            return f"            {kind} inputs:{name}.connect = <{MATERIAL}/{texture}.outputs:{output}>"
        return f"            {kind} inputs:{name} = {value}"

    lines = [
        '        def Shader "surface" {',
        '            uniform token info:id = "UsdPreviewSurface"',
        inputs("color3f", "diffuseColor", "base_color", "rgb", "(1, 1, 1)"),
        inputs("float", "metallic", "metallic_roughness", "b", f"{mesh.metallic:.6g}"),
        inputs("float", "roughness", "metallic_roughness", "g", f"{mesh.roughness:.6g}"),
    ]
    if mesh.occluded:
        lines.append(inputs("float", "occlusion", "metallic_roughness", "r", "1"))
    if "normal" in has:
        lines.append(inputs("normal3f", "normal", "normal", "rgb", ""))
    return [*lines, "            token outputs:surface", "        }"]


def _readers(mesh: TexturedMesh) -> list[str]:
    has = _textures(mesh)
    if not has:
        return []
    lines = [
        '        def Shader "st" {',
        '            uniform token info:id = "UsdPrimvarReader_float2"',
        '            string inputs:varname = "st"',
        "            float2 outputs:result",
        "        }",
    ]
    for name in has:
        lines += [
            f'        def Shader "{name}" {{',
            '            uniform token info:id = "UsdUVTexture"',
            f"            asset inputs:file = @textures/{name}.png@",
            f"            float2 inputs:st.connect = <{MATERIAL}/st.outputs:result>",
            f'            token inputs:sourceColorSpace = "{"sRGB" if name == "base_color" else "raw"}"',
            '            token inputs:wrapS = "clamp"',
            '            token inputs:wrapT = "clamp"',
        ]
        if name == "normal":
            lines += [
                "            float4 inputs:scale = (2, 2, 2, 1)",
                "            float4 inputs:bias = (-1, -1, -1, 0)",
            ]
        if name == "metallic_roughness":
            # Factors of the glTF material; red, the occlusion, has none.
            lines.append(
                f"            float4 inputs:scale = (1, {mesh.roughness:.6g}, {mesh.metallic:.6g}, 1)"
            )
        lines += [
            "            float3 outputs:rgb",
            *(f"            float outputs:{channel}" for channel in "rgb"),
            "        }",
        ]
    return lines


def _tuple(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.9g}" for value in values) + ")"


def _tuples(rows: np.ndarray) -> str:
    return ", ".join(_tuple(row) for row in rows.tolist())
