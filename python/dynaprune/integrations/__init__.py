"""Pruning inside the training loops of other libraries; each module here imports its library.

- ``transformers.Trainer``: ``dynaprune.DynaPruneCallback``.
- Lightning: ``dynaprune.DynaPruneLightningCallback``.
- accelerate needs nothing of its own: ``dynaprune.attach`` takes what ``prepare`` returns, and a pruner can
  be registered for checkpointing::

    from accelerate import Accelerator
    from dynaprune import PruningConfig, attach
    from dynaprune.saving.carried import carry_structure

    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    config = PruningConfig(target_sparsity=0.7, block_size=8, total_steps=len(loader))
    pruner = attach(model, optimizer, config)
    carry_structure(pruner.model)
    accelerator.register_for_checkpointing(pruner)
    for inputs, labels in loader:
        accelerator.backward(loss(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(output_dir)

  ``accelerator.load_state`` continues such a run after the same lines. ``carry_structure`` is for the model's
  file, which is safetensors and would lose the widths of layers that neurons were cut from. accelerate writes
  the states of the optimizer and of everything registered with ``torch.save`` and reads the latter as
  unrestricted pickles: load only checkpoints that you trust as you trust code. A pruner's state itself is
  tensors and plain values; where that trust is missing, keep it without a pickle: ``carried.to_tensors``
  makes tensors by name of it, which safetensors takes, and ``carried.from_tensors`` reads them.
"""
