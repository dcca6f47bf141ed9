import sys,time,math,json,copy,os
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
from noprop_hf import NoPropConfig
from noprop_hf.modeling_noprop import ContextEncoder, vocabulary_nats, sampled_candidates
from noprop_hf.noise_noprop import standardize
torch.set_num_threads(1)
D,V,L,B=64,2048,64,32
I=172
LAYER=4*D*D+3*D*I+2*D*32
E2E=8*LAYER+V*D
TOTAL=8.8e6*3*E2E
C=650
tr=np.load('/tmp/q19/train.npz'); va=np.load('/tmp/q19/val.npz')
W=tr['W']; g=np.random.default_rng(0)
perm=g.permutation(len(W))           # one shuffled order for all
VW=torch.from_numpy(va['W'][g.permutation(len(va['W']))[:3000]].astype(np.int64))
VD=va['D'][np.random.default_rng(0).permutation(len(va['D']))[:3000]] if False else None
def cfg(n):
    c=NoPropConfig(vocab_size=V,hidden_size=D,num_attention_heads=4,intermediate_size=I,num_blocks=4,num_layers_per_block=2,num_pretraining_layers=2); c._attn_implementation="sdpa"; return c
class Part(nn.Module):
    """layers on states, norm, readout, bias; a first part has an input projection"""
    def __init__(self,n,first):
        super().__init__()
        e=ContextEncoder(cfg(n),n); c=cfg(n)
        self.e=e; self.first=first
        for l in e.layers:
            for w in l.parameters():
                if w.ndim>1: nn.init.normal_(w,std=0.02)
        nn.init.eye_(e.input_projection.weight)
        self.readout=nn.Linear(D,D,bias=False); nn.init.orthogonal_(self.readout.weight)
        self.bias=nn.Parameter(torch.zeros(V))
        if not first: e.input_projection=None
        if first: self.table=nn.Parameter(torch.randn(V,D))
    def start_on(self,other):
        for l in self.e.layers:
            nn.init.zeros_(l.self_attn.o_proj.weight); nn.init.zeros_(l.mlp.down_proj.weight)
        self.e.norm.load_state_dict(other.e.norm.state_dict()); self.readout.load_state_dict(other.readout.state_dict()); self.bias.data.copy_(other.bias.data)
    def states(self,x,inp):
        h=self.e.input_projection(x/math.sqrt(D)) if self.first else x
        for l in self.e.layers: h=l(h,**inp)
        return h
    def point(self,h): return self.readout(self.e.norm(h))/math.sqrt(D)
class Trunk:
    def __init__(self,parts):
        self.parts=parts; self.inp=None
        self.table=standardize(parts[0].table.detach()) if parts else None
        self.prior=None
    @torch.no_grad()
    def states(self,ids):
        x=self.table[ids]; inp=inputs(self.parts[0],x)
        for p in self.parts: x=p.states(x,inp)
        return x,inp
def inputs(part,x): return part.e.attention_inputs(x)
def batches(idx,tokens,seed):
    n=int(tokens//(B*L)); need=n*B
    assert need<=len(idx),(need,len(idx))
    idx=np.random.default_rng(seed).permutation(idx)[:need]
    for i in range(n): yield torch.from_numpy(W[idx[i*B:(i+1)*B]].astype(np.int64)), i/n
def run(params,it,loss_of,lr,n,name,decay=True):
    opt=torch.optim.AdamW(params,lr=lr,weight_decay=0.0,fused=True)
    t=time.time(); s=0;k=0
    for ids,f in it:
        m=min(1,f/0.05+1e-3)*(0.5*(1+math.cos(math.pi*f)) if decay else 1)
        for gq in opt.param_groups: gq['lr']=lr*m
        loss=loss_of(ids); loss.backward()
        torch.nn.utils.clip_grad_norm_(params,1.0); opt.step(); opt.zero_grad()
        s+=loss.item();k+=1
        if k%500==0: print(name,f"{f:.2f} {s/500:.3f} {time.time()-t:.0f}s",flush=True); s=0
def phase1(nl,tokens,lr,idx,seed=0,name='phase1'):
    torch.manual_seed(seed)
    p=Part(nl,True); p.bias.data.copy_(PRIOR)
    def loss(ids):
        tab=standardize(p.table); x=F.embedding(ids,tab); inp=inputs(p,x)
        u=p.point(p.states(x,inp))[:,:-1]
        return vocabulary_nats(u,tab,p.bias,ids[:,1:],'mean')
    run(list(p.parameters()),batches(idx,tokens,seed),loss,lr,0,name)
    return p
def part_on(trunk,nl,tokens,lr,idx,seed=1,name='part',start=None):
    torch.manual_seed(seed)
    p=Part(nl,False); p.start_on(trunk.parts[-1])
    if start is not None: p.load_state_dict(start.state_dict())
    if os.environ.get('FREEZE_BIAS'): p.bias.requires_grad_(False)
    def loss(ids):
        x,inp=trunk.states(ids); u=p.point(p.states(x,inp))[:,:-1].flatten(0,1)
        t=ids[:,1:].flatten()
        tok,ti,corr=sampled_candidates(t,PRIOR)
        return vocabulary_nats(u,trunk.table[tok],p.bias[tok]+corr,ti,'mean')
    run([q for q in p.parameters() if q.requires_grad],batches(idx,tokens,seed),loss,lr,0,name)
    return p
cnt=np.bincount(W[perm[:100000]].ravel(),minlength=V)+1
PRIOR=torch.log(torch.tensor(cnt/cnt.sum(),dtype=torch.float32))
@torch.no_grad()
def nats1(trunk,p):
    tot=0;n=0
    for ids in VW.split(64):
        x,inp=trunk.states(ids)
        u=p.point(p.states(x,inp) if p is not trunk.parts[-1] else x)[:,:-1]
        tot+=vocabulary_nats(u,trunk.table,p.bias,ids[:,1:],'sum').item(); n+=ids[:,1:].numel()
    return tot/n
@torch.no_grad()
def pooled(trunk,idx):
    out=[]
    for i in range(0,len(idx),256):
        x,_=trunk.states(torch.from_numpy(W[idx[i:i+256]].astype(np.int64))); out.append(F.normalize(trunk.parts[-1].e.norm(x).mean(1),dim=-1))
    return torch.cat(out)
def kmeans(X,k,seed=0,iters=30):
    gg=torch.Generator().manual_seed(seed); c=X[torch.randperm(len(X),generator=gg)[:k]].clone(); b=torch.zeros(k)
    for it in range(iters):
        d=X@c.T*20-b   # balance: raise the price of clusters that are too full
        a=d.argmax(1); n=torch.bincount(a,minlength=k).float()/len(X)
        b=b+ (n*k).clamp(min=.05).log()*0.5
        c=torch.stack([F.normalize(X[a==j].mean(0),dim=0) if (a==j).any() else X[torch.randint(len(X),(1,),generator=gg)[0]] for j in range(k)])
    return c,b
def assign(X,cb): return (X@cb[0].T*20-cb[1]).argmax(1).numpy()
def router(trunk,idx,lab,k,tokens=6e5,lr=3e-3):
    torch.manual_seed(5)
    r=nn.Linear(D,k); nn.init.zeros_(r.weight)
    lab=torch.from_numpy(lab); opt=torch.optim.AdamW(r.parameters(),lr=lr,weight_decay=0.)
    n=int(tokens//2048); o=np.random.default_rng(3).permutation(len(idx))
    for i in range(n):
        j=o[i*B:(i+1)*B]; x,_=trunk.states(torch.from_numpy(W[idx[j]].astype(np.int64)))
        lo=r(trunk.parts[-1].e.norm(x)); l=F.cross_entropy(lo.flatten(0,1),lab[j].repeat_interleave(L)); l.backward(); opt.step(); opt.zero_grad()
    print('router loss',l.item(),'of',math.log(k),flush=True)
    return r
@torch.no_grad()
def ensemble(trunk,parts,r=None):
    k=len(parts); T={n:0. for n in('alone0','mean','mean_prob','router_logit','router_prob','router_top1','bayes','bayes_router')}; n=0
    al=np.zeros(k)
    for ids in VW.split(32):
        x,inp=trunk.states(ids); y=ids[:,1:]
        lp=[]
        for p in parts:
            u=p.point(p.states(x,inp))[:,:-1]; lp.append((u@trunk.table.T+p.bias).log_softmax(-1))
        lp=torch.stack(lp)  # k,b,l,v
        ly=lp.gather(-1,y[None,...,None].expand(k,-1,-1,1))[...,0] # k,b,l
        al+=-ly.sum((1,2)).numpy(); n+=y.numel()
        T['mean']+=-lp.mean(0).log_softmax(-1).gather(-1,y[...,None]).sum().item()
        T['mean_prob']+=-(ly.logsumexp(0)-math.log(k)).sum().item()
        past=F.pad(ly.cumsum(-1),(1,0))[...,:-1]
        T['bayes']+=-(ly+past.log_softmax(0)).logsumexp(0).sum().item(); T.setdefault('bayes_.6',0.); T['bayes_.6']+=-(ly+(.6*past).log_softmax(0)).logsumexp(0).sum().item()
        if r is not None:
            w=r(trunk.parts[-1].e.norm(x))[:,:-1].log_softmax(-1).permute(2,0,1)
            T['router_logit']+=-(w.exp()[...,None]*lp).sum(0).log_softmax(-1).gather(-1,y[...,None]).sum().item()
            T['router_prob']+=-(ly+w).logsumexp(0).sum().item()
            T['bayes_router']+=-(ly+(w[:,:,:1]+past).log_softmax(0)).logsumexp(0).sum().item(); T.setdefault('bayes_router_t',0.); T['bayes_router_t']+=-(ly+(w+.3*past).log_softmax(0)).logsumexp(0).sum().item(); T['router_top1']+=-ly.gather(0,w.argmax(0)[None]).sum().item()
    T={a:round(b/n,4) for a,b in T.items() if b}; T['alone']=[round(float(v),4) for v in al/n]
    return T
def log(**kw):
    with open('/tmp/q19/results.jsonl','a') as f: f.write(json.dumps(kw)+'\n')
    print('RESULT',kw,flush=True)
HEAD=3*(D*D)
def p1_cost(nl): return 3*(nl*LAYER+V*D)
def part_cost(below,nl): return below*LAYER+3*nl*LAYER+2*C*D+HEAD
