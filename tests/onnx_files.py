"""Small ONNX files whose outputs are given numbers, in the layouts of other projects."""
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = (320, 320)
BOXES = np.float32([[40, 80, 120, 240], [200, 40, 280, 120]])  # xyxy, pixels of the input
SCORES = np.float32([.9, .6])
LABELS = np.int64([1, 0])
LEVELS = (8, 16, 32)


def write_graph(path, outputs, metadata=None, shape=(1, 3) + SIZE, shapes=None, sizes_input=None):
    """A graph that answers `outputs` (name -> array) to any image; `shapes` are those that it declares. A last
    dimension declared by a name is not known before it runs."""
    nodes = [helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
             helper.make_node("Mul", ["mean", "zero"], ["nothing"])]
    constants = [numpy_helper.from_array(np.float32(0), "zero")]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, list(shape))]
    if sizes_input is not None:
        inputs.append(helper.make_tensor_value_info(sizes_input, TensorProto.INT64, ["N", 2]))
        nodes += [helper.make_node("Cast", [sizes_input], ["sizes"], to=TensorProto.FLOAT),
                  helper.make_node("Slice", ["sizes", "first", "second"], ["wh"]),
                  helper.make_node("Concat", ["wh", "wh"], ["whwh"], axis=1)]
        constants += [numpy_helper.from_array(np.int64([0, 0]), "first"),
                      numpy_helper.from_array(np.int64([1, 2]), "second")]
    infos = []
    for name, value in outputs.items():
        constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name + "_value"))
        declared = (shapes or {}).get(name, value.shape)
        is_scaled = sizes_input and name == "boxes"
        is_open = isinstance(declared[-1], str)
        result = name + "_sum" if is_scaled or is_open else name
        nodes.append(helper.make_node("Add", [name + "_value", "nothing"], [result]))
        if is_scaled: nodes.append(helper.make_node("Mul", [result, "whwh"], [name]))
        if is_open:
            constants += [
                numpy_helper.from_array(np.float32([value.shape[-1]]), "length"),
                numpy_helper.from_array(np.int64([0]), "start"),
                numpy_helper.from_array(np.int64([-1]), "axis")
            ]
            nodes += [helper.make_node("Add", ["length", "nothing"], ["end"]),
                      helper.make_node("Cast", ["end"], ["end_int"], to=TensorProto.INT64),
                      helper.make_node("Slice", [result, "start", "end_int", "axis"], [name])]
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, declared))
    graph = helper.make_graph(nodes, "numbers", inputs, infos, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    helper.set_model_props(model, {key: str(value) for key, value in (metadata or {}).items()})
    onnx.save(model, str(path))
    return path


def cells(size=SIZE):
    "Cell x, y and stride of every anchor point, (A,3)."
    found = [(x, y, s) for s in LEVELS for y in range(size[0] // s) for x in range(size[1] // s)]
    return np.float32(found)


def cxcywh(boxes):
    "Center and size."
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def probabilities(classes):
    "The scores as a column for each class, (2,C)."
    table = np.zeros((len(SCORES), classes), np.float32)
    table[np.arange(len(SCORES)), LABELS] = SCORES
    return table


def dense(classes, objectness, each=1, seed=0):
    "Anchor points as a trained network answers: background with low scores, and the two objects. (A,4+[1]+C), decoded."
    rng = np.random.RandomState(seed)
    grid = np.repeat(cells(), each, 0)
    centers = (grid[:, :2] + rng.uniform(0, 1, (len(grid), 2))) * grid[:, 2:]
    sides = grid[:, 2:] * np.exp(rng.normal(.5, .5, (len(grid), 2)))
    columns = [centers, sides]
    if objectness: columns.append(rng.uniform(0, .05, (len(grid), 1)))
    columns.append(rng.uniform(0, .05, (len(grid), classes)))
    rows = np.concatenate(columns, 1).astype(np.float32)
    at = [len(rows) // 3, len(rows) // 2]
    rows[at, :4] = cxcywh(BOXES)
    if objectness: rows[at, 4] = 1
    rows[at, -classes:] = probabilities(classes)
    return rows


def yolox_raw(rows):
    "Rows before YOLOX's decoding step."
    grid = cells()
    raw = rows.copy()
    raw[:, :2] = rows[:, :2] / grid[:, 2:] - grid[:, :2]
    raw[:, 2:4] = np.log(rows[:, 2:4] / grid[:, 2:])
    return raw


def queries(classes, columns=None, logits=False, n=300):
    "Boxes in shares of the input (n,4), and probabilities or logits (n, columns); `columns[i]` is that of class i."
    rng = np.random.RandomState(1)
    boxes = np.concatenate([rng.uniform(.2, .8, (n, 2)), rng.uniform(.05, .2, (n, 2))], 1).astype(np.float32)
    width = max(columns) + 1 if columns else classes
    scores = rng.uniform(.001, .05, (n, width)).astype(np.float32)
    boxes[[5, 9]] = cxcywh(BOXES) / np.float32([SIZE[1], SIZE[0]] * 2)
    scores[[5, 9]] = .01
    for row, score, label in zip((5, 9), SCORES, LABELS): scores[row, columns[label] if columns else label] = score
    return boxes, np.log(scores) - np.log1p(-scores) if logits else scores


def finished(n=300):
    "Finished detections: xyxy (n,4), scores (n,), labels (n,), the rest empty rows."
    boxes = np.zeros((n, 4), np.float32)
    scores = np.zeros(n, np.float32)
    labels = np.zeros(n, np.float32)
    boxes[:2] = BOXES
    scores[:2] = SCORES
    labels[:2] = LABELS
    return boxes, scores, labels
