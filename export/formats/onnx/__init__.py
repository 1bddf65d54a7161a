"""The guarded model as three ONNX graphs, with the files that clients look for beside them."""
