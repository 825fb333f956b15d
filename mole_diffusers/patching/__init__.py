"""A diffusers model with experts in it.

host/ knows what differs between models, gating/ acts while sampling, install/ puts experts in and takes them out, and
subjects/ draws the subjects of a prompt apart. One step of a bound picture, in the order of the call:

    install/pipeline_calls.py     `pipe(prompt)` gets here first: its class has become a subclass, whose calls run inside of
    mixture.Mixture.drawing       a lock of the denoiser (`lock_of`, install/installation.py): other threads wait
    install/one_call.py           `OneCall.running`: what begins and ends with the call; is it drawn in tiles?
    gating/token_masks.py         `on_text`: a text encoder reads the prompt; which expert acts on which token, who is
    inactive gating/shared_state.py        `StepHook`: the denoiser is called; noise level and text are noted, then
                                  `TokenMasks.on_denoiser` does for its text what `on_text` does, before a gate is asked
    binding/picture_layout.py     `decide`: from the second step on, each subject has a place, where its words were attended
    gating/bound_text.py          `make_masks` and `mask`: the masks of words and places for layers, and what is masked
    install/gate_inputs.py        `AroundBlock`: a block begins; `MoLEAttnProcessor`: its gate gets its input
    gating/gate_location.py           `evaluate` asks the gate; `factor` gives each layer its weights, times the mask
    gating/gated_experts.py       `linear`: y = W x + B (factor * (A x))
    gating/cross_attention.py     lowers attention to words outside their places; in the first step, reads it for `decide`

Beside it:

    host/denoisers.py             `RECORDS`: everything that is special about a class of denoisers
    host/placement.py             where gates sit and what they read; install/component.py makes the gate locations
    install/parts.py              what a mixture is made of; the package's own modules ask it, users `mixture.Mixture`
    install/installation.py       on and off; `_hooks` has the order in which hooks run
    undo.py                       how each change is taken back
    gating/settings.py            what the user set; `Setting.now` is the value that holds, in or outside of a `with` block
    install/loaded_adapters.py         which experts' matrices the layers hold: of those that act; the others wait outside
    gating/prompt_tokens.py       which tokens the states that the denoiser reads were made of
    gating/joint_attention.py     lowers attention where a model attends to text and picture together
    gating/kept_text.py           what layers make of a text that comes again in the next step
    subjects/subjects.py            what a prompt names; `PictureCall.obstacle`: why its pipeline can draw no tiles
    subjects/per_subject.py             which subjects of a prompt are drawn in tiles, and why not
    subjects/tiles.py             the steps in which the denoiser is called for each subject; `_plan`: has each room?
"""
