# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""ConvNeXt V2 and FCMAE: models, weights, and the training scripts as console commands.

python -c "from convnextv2_toolkit.models import create_model; create_model('convnextv2_atto')"
"""
