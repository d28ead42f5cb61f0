"""What exporters name: nodes after modules, initializers after parameters.

>>> module_of(NodeProto("Conv", "/layer1/layer1.0/conv1/Conv"))
'layer1.0.conv1'
>>> stem("layer1.0.conv1.weight"), stem("onnx::Conv_15"), stem("model/dense/MatMul/ReadVariableOp:0")
('layer1.0.conv1', '', 'model.dense')
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from neutral.containers.onnx import NodeProto

_NAMESPACE = "namespace"
_RULE = "pkg.onnxscript.rewriter.rule_name"
_ANONYMOUS = re.compile(r"onnx::\w+|val_\d+|_?v?_?\d+|/.*|.*_output_\d+|.*const_fold_opt__?\d+.*|Constant.*|")
_TENSORFLOW = re.compile(r"(.+)/[^/]+/ReadVariableOp(?:_\d+)?(?::\d+)?|(.+)/[^/]+:\d+")
OPERATIONS = ("Tensordot", "conv_transpose", "convolution", "depthwise", "moments")
"""What TensorFlow calls operations inside of a layer."""
_MERGED = re.compile(r".*/merged_input(?::\d+)?")
_FUSED = re.compile(r".*_weights_fused_bn(?::\d+)?")
_CALLS = ("StatefulPartitionedCall", "PartitionedCall")


def anonymous(name: str) -> bool:
    """True for names that an exporter counts up, which tell nothing of the model."""
    return _ANONYMOUS.fullmatch(name) is not None


def stem(name: str) -> str:
    """The layer that the name of an initializer belongs to, or nothing."""
    if anonymous(name):
        return ""
    if "/" in name:
        match = _TENSORFLOW.fullmatch(name)
        found = (match[1] or match[2]) if match else name.rpartition("/")[0]
        parts = [part for part in found.split("/") if part and part not in _CALLS]
        return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] in OPERATIONS else parts)
    return name.rpartition(".")[0]


def common_stem(names: Iterable[str]) -> str:
    """The layer that all names agree on which tell one."""
    found = {stem(name) for name in names} - {""}
    return found.pop() if len(found) == 1 else ""


def module_of(node: NodeProto) -> str:
    """The module that an exporter says a node comes from: torch's namespaces, or the node's own name."""
    scopes = namespace(node)
    if len(scopes) > 1:
        return scopes[-2][0]
    parts = [part for part in node.name.split("/") if part and part not in _CALLS]
    if len(parts) < 2:
        return ""
    found: list[str] = []
    for part in parts[:-1]:
        # torch repeats the name of a container: /layer1/layer1.0/conv1/Conv
        if found and part.startswith(f"{found[-1]}."):
            found[-1] = part
        else:
            found.append(part)
    return ".".join(found)


def namespace(node: NodeProto) -> list[tuple[str, str]]:
    """The modules around a node with their classes, and what it computes: [('conv', 'torch.nn...Conv2d'), ...]."""
    text = node.metadata.get(_NAMESPACE, "")
    if ": " not in text:
        return []
    pairs = (part.partition(": ") for part in text.split("/"))
    return [(name, kind) for name, _, kind in pairs]


def folded(node: NodeProto) -> str:
    """`folded` if an exporter says that it has computed a batch normalization into the weights of this node, `computed` if
    it has made them of others and does not say of which; nothing, if they are as the model had them."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return ""
    inside = any("BatchNorm" in kind for _, kind in namespace(node)[-2:-1])
    if inside or "BatchNorm" in node.metadata.get(_RULE, ""):
        return "folded"
    # tf2onnx names the weights of a convolution into which it computed a norm; TensorFlow those it multiplied by something.
    if any(_FUSED.fullmatch(name) for name in node.inputs[1:2]):
        return "folded"
    if any(_MERGED.fullmatch(name) for name in node.inputs[1:2]):
        return "computed"
    # The older exporter of torch keeps the names of parameters, and numbers what it has computed.
    computed = node.op_type.startswith("Conv") and any(name.startswith("onnx::Conv") for name in node.inputs[1:2])
    return "computed" if computed else ""
