"""A model's weights laid out for generation, and the cache of keys and values that they fill: what engine.py steps.

Shapes: B rows, T tokens of a prompt, S columns of the cache, C channels, H heads, Hkv key heads, D head width.
"""
import torch
import torch.nn.functional as F

from kernels import attention, decode_attention, keys_seen, linear, rms_norm, rotate, swiglu
from model import Linear, rope, rope_frequencies

BLOCK = 256                 # columns by which the cache grows


class Decoder:
    """A copy of a model's weights laid out for generation: in the dtype it computes in, adapters merged, and joined
    where several multiply one input. forward() is model.Backbone's, to the letter, in half as many calls; tests hold
    the two together.
    """

    @torch.inference_mode()
    def __init__(self, model):
        config = self.config = model.config
        self.dtype = dtype = model.model.dtype

        def join(*modules):
            weights = [m.merged_weight() if isinstance(m, Linear) else m.weight for m in modules]
            return torch.cat([weight.detach().to(dtype) for weight in weights])
        self.embedding = join(model.model.embed_tokens)
        self.head = self.embedding if config.tied else join(model.lm_head)
        self.norm, self.layers = join(model.model.norm), []
        self.frequencies = rope_frequencies(config, self.head.device)
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            qk_norm = [a.q_norm] * config.n_head + [a.k_norm] * config.n_kv_head if config.qk_norm else []
            self.layers.append((join(block.input_layernorm), join(a.q_proj, a.k_proj, a.v_proj),
                                join(*qk_norm).view(-1, config.head_dim) if qk_norm else None, join(a.o_proj),
                                join(block.post_attention_layernorm), join(m.gate_proj, m.up_proj), join(m.down_proj)))

    def forward(self, ids, positions, attend):
        """Final hidden states (B, T, C) of ids at positions (B, T); attend(layer, q, k, v) stands for attention."""
        config, eps = self.config, self.config.norm_eps
        sizes = config.n_head + config.n_kv_head, config.n_kv_head
        cos, sin = rope(positions, self.frequencies, self.dtype)
        x = F.embedding(ids, self.embedding)
        for i, (norm_1, qkv, qk_norm, out, norm_2, gate_up, down) in enumerate(self.layers):
            heads = linear(rms_norm(x, norm_1, eps), qkv).unflatten(-1, (-1, config.head_dim))
            qk, v = heads.split(sizes, 2)
            if qk_norm is not None:
                qk = rms_norm(qk, qk_norm, eps)
            q, k = rotate(qk, cos, sin).split((config.n_head, config.n_kv_head), 2)
            x = x + linear(attend(i, q, k, v).flatten(2), out)
            gate, up = linear(rms_norm(x, norm_2, eps), gate_up).chunk(2, -1)
            x = x + linear(swiglu(gate, up), down)
        return rms_norm(x, self.norm, eps)

    def logits(self, hidden):
        """(..., V) fp32 logits of final hidden states."""
        return linear(hidden, self.head).float()


class Cache:
    """Keys and values of the rows in the batch, (layer, 2, row, key head, column, D), grown as they are needed.

    Row b's tokens stand in columns 0 .. len - 1. On CPU they are kept in fp32, which its attention kernels want.
    ids: what row 0 holds, for `stream` to go on from; None if rows come and go, which are then no conversation.
    """

    def __init__(self, model, conversation=True):
        self.model = Decoder(model)
        config, self.device = model.config, model.lm_head.weight.device
        self.dtype = torch.float32 if self.device.type == "cpu" else self.model.dtype
        self.kv = torch.zeros(config.n_layer, 2, 0, config.n_kv_head, 0, config.head_dim, dtype=self.dtype,
                              device=self.device)
        self.ids = [] if conversation else None
        self.buckets = {} if self.device.type == "cuda" else None   # (rows, kind of sampler): input, step and sampler

    @torch.inference_mode()
    def reserve(self, rows, columns):
        """Makes room for so many rows and columns; what is there stays."""
        have_rows, have_columns = self.kv.size(2), self.kv.size(4)
        if rows > have_rows or columns > have_columns:
            if self.buckets and columns > have_columns:     # graphs are captured anew: not often, then
                columns = max(columns, min(2 * have_columns, self.model.config.context))
            columns = max(have_columns, -(-columns // BLOCK) * BLOCK)
            shape = list(self.kv.shape)
            shape[2], shape[4] = max(rows, have_rows), columns
            grown = torch.zeros(shape, dtype=self.dtype, device=self.device)
            grown[:, :, :have_rows, :, :have_columns] = self.kv
            self.kv = grown
            if self.buckets:
                self.buckets = {}                           # they were captured with the old memory

    @torch.inference_mode()
    def prefill(self, places, prompts):
        """(B, V) logits after each prompt, whose keys and values then stand in the rows `places`."""
        talk, held = self.ids is not None, 0
        if talk:                                            # one row, which may hold the beginning already
            held = min(common_prefix(self.ids, prompts[0]), len(prompts[0]) - 1)    # the last one's logits are wanted
            self.ids = list(prompts[0][:held])
        lengths = torch.tensor([len(prompt) - held for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for i, prompt in enumerate(prompts):                # padded on the right, which nothing before it sees
            ids[i, :len(prompt) - held] = torch.tensor(prompt[held:])
        T = ids.size(1)
        positions = torch.arange(held, held + T, device=self.device).expand(len(prompts), T)
        rows = torch.tensor(places, device=self.device)

        def attend(layer, q, k, v):
            keys, values = self.kv[layer]
            keys[rows, :, held:held + T] = k.transpose(1, 2).to(self.dtype)
            values[rows, :, held:held + T] = v.transpose(1, 2).to(self.dtype)
            if not held:
                return attention(q, k, v)
            return decode_attention(q, keys[:1, :, :held + T], values[:1, :, :held + T], positions[:, 0] + 1)
        hidden = self.model.forward(ids.to(self.device), positions, attend)
        if talk:
            self.ids = list(prompts[0])
        return self.model.logits(hidden[torch.arange(len(prompts)), lengths - 1])

    @torch.inference_mode()
    def decode(self, active, sampler):
        """(B, 2): token and log-probability of what each row says next; its newest token joins the cache."""
        B = len(active)
        if self.ids is not None and self.ids != active[0].ids[:-1]:
            raise ValueError("the cache was used for something else meanwhile; one conversation at a time")
        newest = torch.tensor([[row.ids[-1], len(row.ids), row.key, row.made] for row in active])
        columns = int(newest[:, 1].max())
        if self.buckets is None:
            self.reserve(B, columns)
            found = sampler(self.step(newest.to(self.device), columns), active)
        else:
            self.reserve(B, columns)
            size = min(4 ** ((B - 1).bit_length() + 1 >> 1), self.kv.size(2))   # rows beyond B compute nonsense
            found = self.replayed(newest, size, active, sampler)
        if self.ids is not None:
            self.ids.append(active[0].ids[-1])
        return found

    def replayed(self, newest, size, active, sampler):
        """What decode returns, of a step over `size` rows and all columns that is one graph with its sampling."""
        def step():
            logits = self.step(held, self.kv.size(4))
            return sampler.draw(logits, held[:, 2], held[:, 3]) if sampler.captured else logits

        B, kind = len(active), (size, sampler.captured and (sampler.filters, sampler.banned is None))
        if kind not in self.buckets:
            held = torch.ones(size, 4, dtype=torch.long, device=self.device)
            held[:B] = newest                               # capturing runs the step, on the cache as it is
            self.buckets[kind] = held, captured(step, self.device), sampler     # whose memory the graph reads
        held, replay, _ = self.buckets[kind]
        held[:B] = newest
        found = replay()[:B]
        return found if sampler.captured else sampler(found, active)

    def step(self, newest, columns):
        """(B, V) logits of one token a row; the first columns of newest are the token and the row's length with it."""
        ids, lengths, place = newest[:, :1], newest[:, 1], newest[:, 1] - 1
        rows, seen = torch.arange(len(newest), device=self.device), keys_seen(lengths, 1, columns)
        kv = self.kv[:, :, :len(newest), :, :columns]

        def attend(layer, q, k, v):
            keys_values = kv[layer]
            keys_values[:, rows, :, place] = torch.cat((k, v), 1).to(self.dtype)        # (B, 2, Hkv, D)
            return decode_attention(q, *keys_values, lengths, seen=seen)
        hidden = self.model.forward(ids, place[:, None], attend)
        return self.model.logits(hidden[:, 0])

    @torch.inference_mode()
    def keep(self, active, staying):
        """The staying rows, moved together: those from the end fill the places of those that leave."""
        stays, kept = set(staying), active[:len(staying)]
        movers = [place for place in range(len(staying), len(active)) if active[place] in stays]
        for place, row in enumerate(kept):
            if row not in stays:
                mover = movers.pop()
                length = len(active[mover].ids)
                self.kv[:, :, place, :, :length] = self.kv[:, :, mover, :, :length]
                kept[place] = active[mover]
        return kept


def captured(step, device):
    """A function that computes what step() does from the same memory to the same memory, on CUDA as one graph."""
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                       # lazy initialisations must not be captured
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()

    def replay():
        graph.replay()
        return output
    return replay


def common_prefix(a, b):
    """How many ids two lists share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
