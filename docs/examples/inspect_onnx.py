"""Inspects images with an exported detector of one category, without tiles, using ONNX Runtime, Pillow and NumPy.

python inspect_onnx.py parts.onnx image.png …
"""

import bisect
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = json.loads(session.get_modelmeta().custom_metadata_map["unflaw"])
preparation = metadata["config"]["preparation"]
size = preparation["size"]  # the side of a square, or width and height
size = (size, size) if isinstance(size, int) else tuple(size)
if "categories" in metadata or preparation["fit"] != "stretch" or preparation["tile"] or preparation["roi"]:
    sys.exit("this example does not support categories, padding, tiles and regions of interest; unflaw.load does")
calibration = metadata["calibration"]
few = calibration.get("review_only")  # too few good images to call anything defective
band = calibration.get("review_threshold")
review = calibration["threshold"] if few or band is None else band

for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image).transpose(2, 0, 1)[None] / np.float32(255)
    score, anomaly_map = session.run(["score", "map"], {"images": pixels})
    verdict = "defect" if score[0] > calibration["threshold"] and not few else "review" if score[0] > review else "good"
    n = len(calibration["scores"])
    p_value = (1 + n - bisect.bisect_left(calibration["scores"], score[0])) / (n + 1)
    marked = (anomaly_map[0] > calibration["pixel_threshold"]).mean()
    print(f"{path}: {verdict}, score {score[0]:.4f}, p-value {p_value:.4f}, {marked:.1%} of the image marked")
