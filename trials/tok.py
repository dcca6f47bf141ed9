import json,gzip,numpy as np,random
from noprop_hf.data import train_tokenizer
rows=[json.loads(l) for l in gzip.open('/work/shared/data/plentiful/train.jsonl.gz','rt')]
val=[json.loads(l) for l in gzip.open('/work/shared/data/plentiful/validation.jsonl.gz','rt')]
random.seed(0); random.shuffle(rows)
tok=train_tokenizer([r['text'] for r in rows[:2000]],2048,64)
tok.save_pretrained('/tmp/q19/tok')
doms=sorted({r['domain'] for r in rows})
for name,rs in (('train',rows),('val',val)):
    W,D,docs=[],[],[]
    nb=0
    for i,r in enumerate(rs):
        ids=tok(r['text'],add_special_tokens=False)['input_ids'] if hasattr(tok,'__call__') else tok.encode(r['text'])
        ids=np.array(ids,dtype=np.uint16); n=len(ids)//64*64
        nb+=len(tok.decode(ids[:n]).encode())
        w=ids[:n].reshape(-1,64); W.append(w); D.append(np.full(len(w),doms.index(r['domain']),dtype=np.int8)); docs.append(np.full(len(w),i,dtype=np.int32))
    W=np.concatenate(W);D=np.concatenate(D);docs=np.concatenate(docs)
    print(name,W.shape,W.size,nb/W.size,np.bincount(D),doms)
    np.savez(f'/tmp/q19/{name}.npz',W=W,D=D,docs=docs)
