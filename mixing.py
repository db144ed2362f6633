"""Mixtures for pretraining: batches drawn from several folders of tokens by weight or temperature, in stages.

    python pretrain.py --data=data/web=0.7,data/code=0.3
    python pretrain.py --data=data/web,data/code --mix_temperature=3.3
    python pretrain.py --data=data/web=0.9,data/math=0.1 --data_stages="0.8:data/web=0.4,data/math=0.6"

Shares are of tokens, and rows have equally many, so each row of the run is given to a source. Which one, and which of
the source's rows, is a pure function of (seed, step): a resumed run restores nothing, and any number of ranks sees the
same rows. One folder is the mixture of one, with the batches of texts.TextBatches.

Letters: N sources, S stages, B rows of one forward pass, T tokens of context.
"""
import math
import os
import re

import numpy as np

from sources import names_and_weights
from texts import TextBatches, open_tokens

PARTS = 10_000      # shares are whole multiples of 1 / PARTS; the interleaving repeats after so many rows


# --------------------------------------------------------------------------------------------------------------------
# what the options say


def parse_stages(data, data_stages=""):
    """[(share of the run at which the stage begins, {folder: weight or None})]: `data` from 0, then data_stages, as in
    "0.6:a=0.5,b=0.5;0.9:b=0.2,c=0.8". ValueError of one sentence on what is no such thing."""
    stages = [(0.0, "data", data)]
    for item in filter(None, map(str.strip, data_stages.split(";"))):
        begin, colon, mixture = item.partition(":")
        if not colon or not re.fullmatch(r"\d*\.?\d+", begin.strip()):
            raise ValueError(f"data_stages has {item!r}; a stage is the share of the run at which it begins, a colon "
                             "and a mixture, as in 0.8:data/web=0.4,data/math=0.6, with ; between stages")
        if not stages[-1][0] < float(begin) < 1:
            raise ValueError(f"a stage of data_stages begins at {begin} of the run; it must lie below 1 and after "
                             f"{stages[-1][0]:g}, where the one before begins")
        stages.append((float(begin), "data_stages", mixture))
    parsed = []
    for begin, option, mixture in stages:
        pairs = [(mixture, None)] if os.path.isdir(mixture) else names_and_weights(mixture, option)
        weights = {os.path.normpath(name): weight for name, weight in pairs}
        if len(weights) < len(pairs):
            raise ValueError(f"{option} names a folder twice: {mixture!r}; give it one weight")
        total = sum(weight or 0 for weight in weights.values())
        if total and abs(total - 1) > 0.002:
            raise ValueError(f"the weights of {option} add up to {total:.4g}, not 1: {mixture!r}; divided by their sum "
                             f"they are {','.join(f'{name}={weights[name] / total:.3g}' for name in weights)}")
        parsed.append((begin, weights))
    return parsed


def open_folders(data, data_stages=""):
    """Every folder of a mixture once, in the order named; ValueError if one has no held-out side, is damaged or was
    encoded with another tokenizer than the first."""
    folders = list(dict.fromkeys(name for _, weights in parse_stages(data, data_stages) for name in weights))
    found = [open_tokens(folder, "val")[2] for folder in folders]
    for folder, its in zip(folders, found):
        if its["fingerprint"] != found[0]["fingerprint"]:
            raise ValueError(f"{folder} was encoded with a tokenizer of {its['vocab_size']} pieces (fingerprint "
                             f"{its['fingerprint']}) and {folders[0]} with one of {found[0]['vocab_size']} "
                             f"({found[0]['fingerprint']}); a mixture has one tokenizer: run data.py again with "
                             f"--tokenizer={folders[0]}")
    return folders


def text_batches(config, micro_rows, rank, world_size, tokenizer):
    """The MixedBatches that pretrain.py's options ask for."""
    stages = parse_stages(config["data"], config["data_stages"])
    if config["mix_temperature"] <= 0:
        raise ValueError(f"--mix_temperature must be above 0, got {config['mix_temperature']:g}")
    weighted = any(weight for _, weights in stages for weight in weights.values())
    if config["mix_temperature"] != 1 and (weighted or sum(len(weights) for _, weights in stages) == 1):
        raise ValueError(f"--mix_temperature={config['mix_temperature']:g} makes weights for several folders that have "
                         f"none, and data is {config['data']!r}; leave out the weights or the temperature")
    limited = [name for name in ("data_stages", "max_source_epochs") if config[name]]
    if config["max_seconds"] and limited:
        raise ValueError(f"--{limited[0]} needs to know the number of steps, which "
                         f"--max_seconds={config['max_seconds']:g} leaves open; give --max_steps alone")
    return MixedBatches(stages, "train", config["rows_per_step"], micro_rows, config["context"], config["seed"], rank,
                        world_size, config["mask_documents"], tokenizer, config["mix_temperature"],
                        config["max_source_epochs"], 0 if config["max_seconds"] else config["max_steps"])


# --------------------------------------------------------------------------------------------------------------------
# from sizes to shares to the source of each row


def proportions(sizes_N, temperature):
    """p proportional to size^(1 / temperature): 1 is proportional, higher is flatter, towards equal shares."""
    log_N = np.log(sizes_N) / temperature
    p_N = np.exp(log_N - log_N.max())
    return p_N / p_N.sum()


def cap(shares_SN, rows_S, limit_N):
    """The shares with no source above limit_N rows over the whole run: one that was is lowered in all stages alike, and
    in each the others take what it leaves, in proportion. ValueError if there is none left to take it."""
    shares_SN, free_N = np.array(shares_SN), np.ones(len(limit_N), bool)
    while True:
        read_N = rows_S @ shares_SN
        over_N = free_N & (read_N > limit_N * (1 + 1e-9))
        if not over_N.any():
            return shares_SN
        free_N &= ~over_N
        shares_SN[:, over_N] *= limit_N[over_N] / read_N[over_N]
        left_S, others_S = 1 - shares_SN.sum(1), shares_SN @ free_N
        for stage in np.flatnonzero((left_S > 1e-9) & (others_S <= 0)):
            raise ValueError(f"stage {stage + 1} of {len(rows_S)} trains on {rows_S[stage]:,} rows, and of its sources "
                             f"--max_source_epochs allows {int(limit_N[shares_SN[stage] > 0].sum()):,} in the whole "
                             "run; add data, raise --max_source_epochs, or lower --max_steps")
        factor_S = np.divide(left_S, others_S, out=np.zeros_like(left_S), where=others_S > 0)
        shares_SN += np.outer(factor_S, free_N) * shares_SN


def whole_parts(shares_N, keep_N):
    """The shares in whole PARTS that add up, at least one for each source that has a share. What rounding down leaves
    goes to the sources that lost most by it, to those of keep_N (capped) last."""
    exact_N = shares_N * PARTS
    parts_N = np.maximum(np.floor(exact_N + 1e-6), shares_N > 0).astype(int)
    while parts_N.sum() < PARTS:
        parts_N[np.argmax(np.where(shares_N > 0, exact_N - parts_N - PARTS * keep_N, -math.inf))] += 1
    while parts_N.sum() > PARTS:
        parts_N[np.argmax(np.where(parts_N > 1, parts_N - exact_N, -math.inf))] -= 1
    return parts_N // np.gcd.reduce(parts_N)


def interleave(parts_N):
    """(sum(parts_N),) source of each row of a period, which holds parts_N[i] rows of source i. After any number of rows
    each source is less than one row from its share.

    Earliest deadline first: a source's next row may come once its share asks for it, and is due when the share asks
    for the one after it. Such a schedule always exists (Tijdeman 1980, The chairman assignment problem), and this order
    finds it (Baruah et al. 1996, Proportionate progress).
    """
    total, read, order = int(sum(parts_N)), [0] * len(parts_N), []
    for row in range(total):
        asked = [i for i, parts in enumerate(parts_N) if read[i] * total < (row + 1) * parts]
        order.append(min(asked, key=lambda i: (read[i] + 1) / parts_N[i]))
        read[order[-1]] += 1
    return np.array(order)


class MixedBatches:
    """Batches of packed text from several folders, a pure function of (seed, step, micro), the same for any number of
    ranks. Each source is read in shuffled epochs of its own, whatever the others do.

    `stages` is what parse_stages() returns. max_steps is needed by stages and max_epochs; 0: the end is not known.
    """

    def __init__(self, stages, split, rows_per_step, micro_rows, context, seed, rank=0, world_size=1,
                 mask_documents=False, tokenizer=None, temperature=1.0, max_epochs=0.0, max_steps=0):
        self.folders = list(dict.fromkeys(name for _, weights in stages for name in weights))
        least = rows_per_step if len(self.folders) == 1 else 1          # of a mixture, each source holds a row
        self.sources = [TextBatches(folder, split, least, least, context, seed + (i << 32), 0, 1, mask_documents,
                                    tokenizer) for i, folder in enumerate(self.folders)]
        short = [os.path.basename(folder) for folder in self.folders]
        self.names = short if len(set(short)) == len(short) else self.folders
        self.rows_per_step, self.context, self.max_steps = rows_per_step, context, max_steps
        self.micro_rows, self.rank, self.world_size, self.latest = micro_rows, rank, world_size, (None, None)
        self.n_tokens = sum(source.n_tokens for source in self.sources)
        self.epoch_rows_N = np.array([source.n_rows_per_epoch for source in self.sources])
        self.steps_per_epoch = int(self.epoch_rows_N.sum()) / rows_per_step

        # the shares asked for, and those that max_epochs leaves
        asked_SN = np.zeros((len(stages), len(self.folders)))
        for s, (_, weights) in enumerate(stages):
            which = [self.folders.index(name) for name in weights]
            sizes = np.array([self.sources[i].n_tokens for i in which])
            given = list(weights.values())
            asked_SN[s, which] = np.array(given) / sum(given) if given[0] else proportions(sizes, temperature)
        self.begins_S = [round(begin * max_steps) for begin, _ in stages]
        ends = [*self.begins_S[1:], max_steps or 1]
        if any(end <= begin for begin, end in zip(self.begins_S, ends)):
            raise ValueError(f"stages that begin at {', '.join(f'{begin:g}' for begin, _ in stages)} of {max_steps} "
                             "steps leave one without a step; raise --max_steps or move them apart")
        rows_S = (np.array(ends) - self.begins_S) * rows_per_step
        shares_SN = cap(asked_SN, rows_S, max_epochs * self.epoch_rows_N if max_epochs else
                        np.full(len(self.folders), math.inf))
        capped_N = rows_S @ shares_SN < rows_S @ asked_SN * (1 - 1e-9)
        self.capped = [(name, asked, kept) for name, asked, kept, is_capped in
                       zip(self.names, rows_S @ asked_SN / rows_S.sum(), rows_S @ shares_SN / rows_S.sum(), capped_N)
                       if is_capped]

        # the source of each row of a period, how many of each came before each row, and before the stage
        self.order_S, self.counts_S, self.before_S = [], [], [np.zeros(len(self.folders), int)]
        for s, end in enumerate(ends):
            order = interleave(whole_parts(shares_SN[s], capped_N))
            one_hot = order[:, None] == np.arange(len(self.folders))
            self.order_S.append(order)
            self.counts_S.append(np.concatenate([np.zeros((1, len(self.folders)), int), np.cumsum(one_hot, 0)]))
            self.before_S.append(self.rows_before(end, s))
        self.share_N = self.before_S[-1] / self.before_S[-1].sum() if max_steps else shares_SN[0]
        self.bytes_per_token_N = np.array([source.attributes.get("text_bytes", 0) / source.n_tokens
                                           for source in self.sources])

    @property
    def most_documents(self):
        """The most documents, or parts of them, that a row holds; 1 where documents see each other."""
        return max(source.most_documents for source in self.sources)

    def stage(self, step):
        """Index of the stage that a step belongs to."""
        return int(np.searchsorted(self.begins_S, step, "right")) - 1

    def rows_before(self, step, stage=None):
        """(N,) rows of each source in all steps before `step`."""
        s = self.stage(step) if stage is None else stage
        rounds, rest = divmod((step - self.begins_S[s]) * self.rows_per_step, len(self.order_S[s]))
        return self.before_S[s] + rounds * self.counts_S[s][-1] + self.counts_S[s][rest]

    def rows(self, step):
        """(source of each row of the step, index of the row in it), in the order (micro, rank, row)."""
        if self.latest[0] != step:
            s = self.stage(step)
            first = (step - self.begins_S[s]) * self.rows_per_step
            order = self.order_S[s]
            source_R = order[np.arange(first, first + self.rows_per_step) % len(order)]
            row_R = np.empty_like(source_R)
            for i, before in enumerate(self.rows_before(step)):
                here_R = source_R == i
                if here_R.any():
                    row_R[here_R] = self.sources[i].read(int(before), int(here_R.sum()))
            self.latest = step, (source_R, row_R)
        return self.latest[1]

    def __call__(self, step, micro):
        """(ids (B, T), targets (B, T), cu_seqlens or None) of one rank's micro-batch; -100 where there is no target."""
        import torch  # not at the top: the machinery above is NumPy's
        source_B, row_B = (x.reshape(-1, self.world_size, self.micro_rows)[micro, self.rank] for x in self.rows(step))
        ids_BT, targets_BT = (torch.empty(len(row_B), self.context, dtype=torch.int64) for _ in range(2))
        bounds = [np.array([len(row_B) * self.context])]
        for i in np.unique(source_B):
            here = np.flatnonzero(source_B == i)
            ids_BT[here], targets_BT[here], cu_seqlens = self.sources[i].gather(row_B[here])
            if cu_seqlens is not None:                      # offsets within these rows, moved to where the rows stand
                row, inside = np.divmod(cu_seqlens.numpy()[:-1], self.context)
                bounds.append(here[row] * self.context + inside)
        cu_seqlens = torch.from_numpy(np.sort(np.concatenate(bounds)).astype(np.int32)) if len(bounds) > 1 else None
        return ids_BT, targets_BT, cu_seqlens

    def targets_in_step(self, step):
        """Targets of the whole step that are not -100, over all micro-batches and ranks: its one denominator."""
        source_R, row_R = self.rows(step)
        return sum(source.targets_in(row_R[source_R == i]) for i, source in enumerate(self.sources))

    def epoch(self, step):
        """Passes over all sources together that are done before `step`, with fraction."""
        return step / self.steps_per_epoch

    # --- what is said and logged ---

    def average(self, scores_N, second="val_bpb"):
        """(nats per token, bits per byte or what `second` is) of the mixture that the whole run trains on, from those
        of each source. Bits per byte are weighted by bytes, all else by tokens."""
        bytes_N = self.share_N * self.bytes_per_token_N
        weights = self.share_N, bytes_N / bytes_N.sum() if second == "val_bpb" and bytes_N.sum() else self.share_N
        return tuple(float(sum(w * score for w, score in zip(weight_N, column_N)))
                     for weight_N, column_N in zip(weights, zip(*scores_N)))

    def metrics(self, step, scores_N, second="val_bpb"):
        """What the log has of each source of a mixture: held-out loss, and what was trained on so far."""
        found = {}
        for name, (loss, score) in zip(self.names, scores_N) if len(self.names) > 1 else ():
            found.update({f"val_loss/{name}": loss, f"{second}/{name}": score})
        for name, rows, bytes_per_token, epoch_rows in (zip(self.names, self.rows_before(step).tolist(),
                                                            self.bytes_per_token_N, self.epoch_rows_N)
                                                        if found else ()):
            tokens = rows * self.context
            found.update({f"tokens/{name}": tokens, f"bytes/{name}": round(tokens * bytes_per_token),
                          f"epoch/{name}": rows / int(epoch_rows)})
        return found

    def plan(self):
        """Lines that say, of a mixture, what the run will train on."""
        lines = []
        for s, begin in enumerate(self.begins_S) if len(self.names) > 1 else ():
            parts_N = self.counts_S[s][-1]
            shares = (f"{name} {parts / parts_N.sum():.2%}" for name, parts in zip(self.names, parts_N) if parts)
            lines.append(f"from step {begin}: {', '.join(shares)} of the tokens")
        for name, asked, kept in self.capped:
            lines.append(f"{name}: {asked:.2%} of the run's tokens were asked for, {kept:.2%} are as many epochs as "
                         "--max_source_epochs allows; the other sources take the rest")
        for name, epochs in zip(self.names, self.before_S[-1] / self.epoch_rows_N) if lines and self.max_steps else ():
            lines.append(f"{name}: {epochs:.2f} epochs in all")
        return lines

    def report(self, step):
        """Lines that say, of a mixture, what the steps before `step` trained on."""
        tokens_N = self.rows_before(step) * self.context
        bytes_N = tokens_N * self.bytes_per_token_N
        return [f"{name}: {tokens:,} tokens ({tokens / tokens_N.sum():.2%}), {n_bytes / 1e6:,.2f} MB "
                f"({n_bytes / max(1, bytes_N.sum()):.2%}), {tokens / self.context / rows:.2f} epochs"
                for name, tokens, n_bytes, rows in zip(self.names, tokens_N.tolist(), bytes_N, self.epoch_rows_N)
                if len(self.names) > 1 and step]
