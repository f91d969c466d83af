# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.generation.sampling."""

from gemma4.generation.sampling import Processor, Sample, Sampler, SamplingParams, StopCriteria, kth_largest, logprobs

__all__ = ["Processor", "Sample", "Sampler", "SamplingParams", "StopCriteria", "kth_largest", "logprobs"]
