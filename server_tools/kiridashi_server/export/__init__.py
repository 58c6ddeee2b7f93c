"""From a cut torch model to the files of a bundle: ONNX, TFLite, their int8 forms, and what proves them."""
